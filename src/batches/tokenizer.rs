//! The tokenizer of the base model: tokenizer.json, the special tokens named beside it, and those a template
//! registers (contract 2.4 fix_special_tokens, 2.7). Texts in, ids out; what is tokenized is in `encode.rs`.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tokenizers::pipeline::{EncodeOptions, PipelineToken, PipelineTokenizer};

use super::surfaces::Surfaces;
use super::template::Template;
use crate::{Error, Result};

/// Special tokens that transformers registers when it loads a tokenizer, in its order.
const SPECIAL_ROLES: &[&str] =
    &["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// A tokenizer with a template's special tokens registered.
pub struct Tokenizer {
    pipeline: PipelineTokenizer,
    options: EncodeOptions,
    surfaces: Surfaces,
    pub bos: Option<u32>,
    pub eos: u32,
    pub pad: u32,
    path: PathBuf,
}

impl Tokenizer {
    /// Loads `model_dir`/tokenizer.json and registers what `template` needs.
    ///
    /// # Errors
    /// No tokenizer.json, a broken one, or one with a component that is not covered.
    pub fn load(model_dir: &Path, template: &Template) -> Result<Self> {
        let path = model_dir.join("tokenizer.json");
        if !path.is_file() {
            return Err(missing(model_dir, &path));
        }
        let mut document = object(&path)?;
        let mut names = Names::read(model_dir)?;
        let mut added = Added::new(&document).map_err(|error| error.at_path(&path))?;
        for (content, special) in &names.registered {
            added.register(content, *special);
        }
        fix_special_tokens(template, &mut names, &mut added);
        let id = |name: &Option<String>| name.as_ref().and_then(|name| added.id(name));
        let (bos, eos, pad) = (id(&names.bos), id(&names.eos), id(&names.pad));
        let eos = eos.ok_or_else(|| Error::internal("the eos token was not registered").at_path(&path))?;
        let surfaces = Surfaces::new(&document, &added.all);
        document["added_tokens"] = Value::Array(added.entries);
        // Neither acts on element-wise encoding without special tokens, and LLaMA-Factory sets no limits.
        for part in ["truncation", "padding", "post_processor"] {
            document[part] = Value::Null;
        }
        let broken = |error: String| {
            Error::refused(format!("this tokenizer cannot be used: {error}"))
                .at_path(&path)
                .next("save it again with a recent transformers: AutoTokenizer.from_pretrained(…).save_pretrained(…)")
        };
        tokenizers::canonicalize_value(&mut document).map_err(|error| broken(error.to_string()))?;
        let pipeline = tokenizers::from_json(&document.to_string()).map_err(|error| broken(error.to_string()))?;
        let options = EncodeOptions { add_special_tokens: false, ..EncodeOptions::default() };
        Ok(Self { pipeline, options, surfaces, bos, eos, pad: pad.unwrap_or(eos), path })
    }

    /// Ids of one template element, without special tokens around it.
    ///
    /// # Errors
    /// The tokenizer cannot encode the text (a model without an unknown token).
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let mut tokens = Vec::with_capacity(text.len() / 3 + 1);
        self.pipeline
            .encode_into(text, &self.options, &mut tokens)
            .map_err(|error| Error::input(format!("cannot tokenize: {error}")).at_path(&self.path))?;
        Ok(PipelineToken::cast_slice(&tokens).to_vec())
    }

    /// Byte offset in `text` at which each of its `ids` starts; exact for byte-level tokenizers, the best
    /// match where a normalizer rewrote the text.
    pub fn starts(&self, text: &str, ids: &[u32]) -> Vec<usize> {
        self.surfaces.starts(text, ids)
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
    let value: Value =
        serde_json::from_str(&text).map_err(|error| Error::input(format!("not valid JSON: {error}")).at_path(path))?;
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

/// llamafactory Template.fix_special_tokens.
fn fix_special_tokens(template: &Template, names: &mut Names, added: &mut Added) {
    let mut stop_words = template.stop_words;
    if let (true, Some((first, rest))) = (template.replace_eos, stop_words.split_first()) {
        added.register(first, true);
        names.eos = Some((*first).to_string());
        stop_words = rest;
    }
    if names.eos.is_none() {
        names.eos = Some("<|endoftext|>".into());
    }
    // transformers registered a named eos already; a name that the vocabulary lacks is added here.
    if let Some(eos) = &names.eos {
        added.register(eos, true);
    }
    if names.pad.is_none() {
        names.pad.clone_from(&names.eos);
    }
    for word in stop_words {
        added.register(word, true);
    }
}

/// The vocabulary and the added tokens of a tokenizer.json under edit.
struct Added {
    entries: Vec<Value>,
    /// Every token with its id: the model's and the added ones.
    all: std::collections::HashMap<String, u32>,
    /// Id of the next new token: one after the last of all (vocabularies have no holes).
    next: u32,
}

impl Added {
    fn new(document: &Value) -> Result<Self> {
        let vocabulary = document.get("model").and_then(|model| model.get("vocab"));
        let mut all = std::collections::HashMap::new();
        let id_of = |id: &Value| id.as_u64().and_then(|id| u32::try_from(id).ok());
        match vocabulary {
            Some(Value::Object(tokens)) => {
                for (token, id) in tokens {
                    let id = id_of(id).ok_or_else(|| Error::input(format!("model.vocab: `{token}` has no id")))?;
                    all.insert(token.clone(), id);
                }
            }
            // Unigram: [token, score] pairs in id order.
            Some(Value::Array(pairs)) => {
                for (id, pair) in (0u32..).zip(pairs) {
                    let token = pair.get(0).and_then(Value::as_str);
                    all.insert(token.ok_or_else(|| Error::input("model.vocab: a pair without a token"))?.into(), id);
                }
            }
            _ => return Err(Error::input("model.vocab is missing")),
        }
        let entries = document.get("added_tokens").and_then(Value::as_array).cloned().unwrap_or_default();
        for entry in &entries {
            let (token, id) = (content(entry), entry.get("id").and_then(id_of));
            let (Some(token), Some(id)) = (token, id) else {
                return Err(Error::input("added_tokens: an entry without content or id"));
            };
            all.insert(token, id);
        }
        let next = all.values().max().map_or(0, |last| last.saturating_add(1));
        Ok(Self { entries, all, next })
    }

    fn id(&self, content: &str) -> Option<u32> {
        self.all.get(content).copied()
    }

    /// `tokenizer.add_tokens`: a token that is already added stays as it is; one of the model's keeps its id.
    fn register(&mut self, token: &str, special: bool) {
        if self.entries.iter().any(|entry| entry.get("content").and_then(Value::as_str) == Some(token)) {
            return;
        }
        let id = self.id(token).unwrap_or(self.next);
        self.next = self.next.max(id.saturating_add(1));
        self.all.insert(token.to_string(), id);
        self.entries.push(json!({
            "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": !special, "special": special,
        }));
    }
}
