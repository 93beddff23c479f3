//! The tokenizer of the base model: tokenizer.json, the special tokens named beside it, and those a template
//! registers (contract 2.4 fix_special_tokens, 2.7). Texts in, ids out; what is tokenized is in `encode.rs`.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tokenizers::AddedToken;

use super::template::Template;
use super::words::{Tokens, Words};
use crate::{Error, Result};

/// Special tokens that transformers registers when it loads a tokenizer, in its order.
const SPECIAL_ROLES: &[&str] =
    &["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// A tokenizer with a template's special tokens registered. The `tokenizers` crate is the one behind
/// transformers' fast tokenizers.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// `None`: its texts are not tokenized word by word.
    words: Option<Words>,
    pub bos: Option<u32>,
    pub eos: u32,
    pub pad: u32,
    path: PathBuf,
}

impl Tokenizer {
    /// Loads `model_dir`/tokenizer.json and registers what `template` needs.
    ///
    /// # Errors
    /// No tokenizer.json, or a broken one.
    pub fn load(model_dir: &Path, template: &Template) -> Result<Self> {
        let path = model_dir.join("tokenizer.json");
        if !path.is_file() {
            return Err(missing(model_dir, &path));
        }
        let broken = |error: tokenizers::Error| {
            Error::input(format!("not a tokenizer: {error}"))
                .at_path(&path)
                .next("save it again with transformers: AutoTokenizer.from_pretrained(…).save_pretrained(…)")
        };
        let mut inner = tokenizers::Tokenizer::from_file(&path).map_err(broken)?;
        // LLaMA-Factory encodes elements whole and cuts them itself.
        inner.with_truncation(None).map_err(broken)?;
        inner.with_padding(None);
        let mut names = Names::read(model_dir)?;
        let mut wanted = std::mem::take(&mut names.registered);
        wanted.extend(fix_special_tokens(template, &mut names).into_iter().map(|token| (token, true)));
        for (token, special) in wanted {
            // A token that is already added stays as it is; one of the model's keeps its id.
            let known = inner.get_added_vocabulary().get_vocab().contains_key(&token);
            if !known {
                inner.add_tokens([AddedToken::from(token, special)]).map_err(broken)?;
            }
        }
        let id = |name: &Option<String>| name.as_ref().and_then(|name| inner.token_to_id(name));
        let (bos, eos, pad) = (id(&names.bos), id(&names.eos), id(&names.pad));
        let eos = eos.ok_or_else(|| Error::internal("the eos token was not registered").at_path(&path))?;
        Ok(Self { words: Words::of(&inner), inner, bos, eos, pad: pad.unwrap_or(eos), path })
    }

    /// Ids of one template element, without special tokens around it, and the byte of `text` at which each starts.
    ///
    /// # Errors
    /// The tokenizer cannot encode the text (a model without an unknown token).
    pub fn encode(&self, text: &str) -> Result<Tokens> {
        let by_word = self.words.as_ref().map_or(Ok(None), |words| words.encode(&self.inner, text));
        match by_word.map_err(|error| self.failed(&error))? {
            Some(tokens) => Ok(tokens),
            None => self.encode_whole(text),
        }
    }

    /// By the crate alone.
    fn encode_whole(&self, text: &str) -> Result<Tokens> {
        let encoded = self.inner.encode(text, false).map_err(|error| self.failed(&error))?;
        Ok((encoded.get_ids().to_vec(), encoded.get_offsets().iter().map(|&(start, _)| start).collect()))
    }

    fn failed(&self, error: &tokenizers::Error) -> Error {
        Error::input(format!("cannot tokenize: {error}")).at_path(&self.path)
    }
}

fn missing(model_dir: &Path, path: &Path) -> Error {
    if !model_dir.is_dir() {
        return Error::input(format!("the base model folder {} does not exist", model_dir.display()))
            .at("model_name_or_path")
            .next(
                "download the model and point model_name_or_path to its folder; relative paths resolve against --root",
            );
    }
    let legacy = ["tokenizer.model", "vocab.json"].iter().find(|name| model_dir.join(name).is_file());
    let what = match legacy {
        Some(name) => format!("no tokenizer.json, only {name}, which is not read"),
        None => "no tokenizer.json".to_string(),
    };
    Error::input(what)
        .at_path(path)
        .next("write one with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)")
}

/// A JSON object file.
fn object(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).map_err(|error| Error::input(error.to_string()).at_path(path))?;
    let value: Value = serde_json::from_str(&text).map_err(|error| {
        Error::input(format!("not valid JSON: {error}")).at_path(path).next("copy or download the model folder again")
    })?;
    if value.is_object() { Ok(value) } else { Err(Error::input("not a JSON object").at_path(path)) }
}

/// Special tokens by name, as tokenizer_config.json and special_tokens_map.json give them.
struct Names {
    bos: Option<String>,
    eos: Option<String>,
    pad: Option<String>,
    /// (content, special) of everything transformers registers at load time.
    registered: Vec<(String, bool)>,
}

impl Names {
    fn read(model_dir: &Path) -> Result<Self> {
        let open = |name: &str| -> Result<Value> {
            let path = model_dir.join(name);
            if path.is_file() { object(&path) } else { Ok(json!({})) }
        };
        let (config, map) = (open("tokenizer_config.json")?, open("special_tokens_map.json")?);
        let named = |role: &str| content(config.get(role).unwrap_or_else(|| map.get(role).unwrap_or(&Value::Null)));
        let mut registered = Vec::new();
        if let Some(decoder) = config.get("added_tokens_decoder").and_then(Value::as_object) {
            let mut entries: Vec<(u64, &Value)> =
                decoder.iter().filter_map(|(id, token)| Some((id.parse().ok()?, token))).collect();
            entries.sort_by_key(|(id, _)| *id);
            for (_, token) in entries {
                let special = token.get("special").and_then(Value::as_bool).unwrap_or(true);
                registered.extend(content(token).map(|content| (content, special)));
            }
        }
        registered.extend(SPECIAL_ROLES.iter().filter_map(|role| named(role)).map(|content| (content, true)));
        for list in ["additional_special_tokens", "extra_special_tokens"] {
            let tokens = config.get(list).or_else(|| map.get(list)).and_then(Value::as_array);
            registered.extend(tokens.into_iter().flatten().filter_map(content).map(|content| (content, true)));
        }
        Ok(Self { bos: named("bos_token"), eos: named("eos_token"), pad: named("pad_token"), registered })
    }
}

/// A special token is written as its text or as an AddedToken object.
fn content(token: &Value) -> Option<String> {
    let text = token.as_str().or_else(|| token.get("content").and_then(Value::as_str))?;
    (!text.is_empty()).then(|| text.to_string())
}

/// llamafactory Template.fix_special_tokens: settles eos and pad, returns the tokens to register.
fn fix_special_tokens(template: &Template, names: &mut Names) -> Vec<String> {
    let mut stop_words = template.stop_words;
    let mut register = Vec::new();
    if let (true, Some((first, rest))) = (template.replace_eos, stop_words.split_first()) {
        names.eos = Some((*first).to_string());
        stop_words = rest;
    }
    register.push(names.eos.get_or_insert_with(|| "<|endoftext|>".into()).clone());
    if names.pad.is_none() {
        names.pad.clone_from(&names.eos);
    }
    register.extend(stop_words.iter().map(|word| (*word).to_string()));
    register
}
