//! Tokens of the words that texts are made of, each tokenized once: what a text costs the `tokenizers` crate is the
//! bookkeeping of every character, not the merging. Only for tokenizers whose words do not depend on their
//! neighbours; all others take the crate's own way (`tokenizer.rs`).

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use tokenizers::pattern::Pattern;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::utils::SysRegex;
use tokenizers::{
    ModelWrapper, NormalizerWrapper, OffsetReferential, OffsetType, Offsets, PostProcessorWrapper, PreTokenizedString,
    PreTokenizer, PreTokenizerWrapper, Result, SplitDelimiterBehavior, Tokenizer,
};

/// What `ByteLevel` cuts by when it is told to (pre_tokenizers/byte_level.rs, GPT-2's encoder.py).
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Longer texts hardly come again.
const LONGEST: usize = 64;
/// Threads that look up different texts do not wait for each other.
const SHARDS: usize = 64;
/// Texts of one shard: together some MB.
const MOST: usize = 1024;

/// Token ids of a text, and the byte at which each starts in it.
pub type Tokens = (Vec<u32>, Vec<usize>);
type Cut = Box<dyn Fn(&str) -> Result<Vec<(Offsets, bool)>> + Send + Sync>;

/// What was tokenized before, and how a text is cut into words.
pub struct Words {
    cuts: Vec<Cut>,
    /// A normalizer that leaves ASCII as it is.
    only_ascii: bool,
    words: Known,
    /// Whole texts between added tokens: a template's, and what many rows say. Another store, since a word cut out of a
    /// text may be cut again when it stands alone.
    parts: Known,
}

impl Words {
    /// `None`: with this tokenizer the tokens of a word may depend on what is around it, or the crate moves offsets
    /// afterwards.
    pub fn of(tokenizer: &Tokenizer) -> Option<Self> {
        let only_ascii = match tokenizer.get_normalizer() {
            None => false,
            Some(NormalizerWrapper::NFC(_)) => true,
            Some(_) => return None,
        };
        let by_word = matches!(tokenizer.get_model(), ModelWrapper::BPE(model) if model.dropout.is_none());
        let cuts = cuts(tokenizer.get_pre_tokenizer()?)?;
        let kept = tokenizer.get_post_processor().is_none_or(keeps_offsets);
        (by_word && kept).then(|| Self { cuts, only_ascii, words: Known::new(), parts: Known::new() })
    }

    /// What `tokenizer.encode(text, false)` gives; `None`: it has to be asked.
    ///
    /// # Errors
    /// The tokenizer cannot encode a word.
    pub fn encode(&self, tokenizer: &Tokenizer, text: &str) -> Result<Option<Tokens>> {
        if self.only_ascii && !text.is_ascii() {
            return Ok(None);
        }
        let parts = tokenizer.get_added_vocabulary().extract_and_normalize(None::<&NormalizerWrapper>, text);
        let mut all = Tokens::default();
        for (part, (base, _), added) in parts.get_splits(OffsetReferential::Original, OffsetType::Byte) {
            if let Some(added) = added {
                all.0.extend(added.iter().map(|token| token.id));
                all.1.resize(all.0.len(), base);
                continue;
            }
            self.parts.append(&mut all, part, base, || self.part(tokenizer, part))?;
        }
        Ok(Some(all))
    }

    /// Tokens of a text without added tokens.
    fn part(&self, tokenizer: &Tokenizer, text: &str) -> Result<Tokens> {
        let mut all = Tokens::default();
        for range in self.cut(text)? {
            let word = &text[range.clone()];
            self.words.append(&mut all, word, range.start, || tokens(tokenizer, word))?;
        }
        Ok(all)
    }

    fn cut(&self, text: &str) -> Result<Vec<Range<usize>>> {
        let mut words: Vec<Range<usize>> = std::iter::once(0..text.len()).collect();
        for cut in &self.cuts {
            let mut finer = Vec::with_capacity(text.len() / 2);
            for word in words {
                let pieces = cut(&text[word.clone()])?;
                let ranges = pieces.into_iter().map(|((from, to), _)| word.start + from..word.start + to);
                finer.extend(ranges.filter(|range| !range.is_empty()));
            }
            words = finer;
        }
        Ok(words)
    }
}

/// A bounded store of short texts' tokens, shared by all threads.
struct Known([Mutex<HashMap<Box<str>, Tokens>>; SHARDS]);

impl Known {
    fn new() -> Self {
        Self(std::array::from_fn(|_| Mutex::default()))
    }

    /// Appends the tokens of `text`, which begins at byte `base` of the text that `all` belongs to.
    fn append(&self, all: &mut Tokens, text: &str, base: usize, make: impl FnOnce() -> Result<Tokens>) -> Result<()> {
        let mut add = |(ids, starts): &Tokens| {
            all.0.extend_from_slice(ids);
            all.1.extend(starts.iter().map(|start| base + start));
        };
        if text.len() > LONGEST {
            add(&make()?);
            return Ok(());
        }
        let hash = text.bytes().fold(0u32, |hash, byte| hash.wrapping_mul(31).wrapping_add(byte.into()));
        let shard = || self.0[hash as usize % SHARDS].lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tokens) = shard().get(text) {
            add(tokens);
            return Ok(());
        }
        let tokens = make()?;
        add(&tokens);
        let mut shard = shard();
        if shard.len() < MOST {
            shard.insert(text.into(), tokens);
        }
        Ok(())
    }
}

/// The tokens of one word, as the crate makes them once it has cut a text.
fn tokens(tokenizer: &Tokenizer, word: &str) -> Result<Tokens> {
    use tokenizers::Model;
    let mut text = PreTokenizedString::from(word);
    ByteLevel::new(false, false, false).pre_tokenize(&mut text)?;
    text.tokenize(|word| tokenizer.get_model().tokenize(word.get()))?;
    let encoding = text.into_encoding(None, 0, OffsetType::Byte)?;
    Ok((encoding.get_ids().to_vec(), encoding.get_offsets().iter().map(|&(start, _)| start).collect()))
}

/// The cuts in front of the byte level, with its own; `None`: something else is done to the words as well.
fn cuts(pre: &PreTokenizerWrapper) -> Option<Vec<Cut>> {
    let steps = match pre {
        PreTokenizerWrapper::Sequence(sequence) => sequence.as_ref(),
        one => std::slice::from_ref(one),
    };
    let (PreTokenizerWrapper::ByteLevel(bytes), before) = steps.split_last()? else { return None };
    if bytes.add_prefix_space {
        return None;
    }
    let by = |regex: SysRegex| -> Cut { Box::new(move |text| (&regex).find_matches(text)) };
    let mut cuts = Vec::new();
    for step in before {
        cuts.push(match step {
            PreTokenizerWrapper::Split(split)
                if split.behavior == SplitDelimiterBehavior::Isolated && !split.invert =>
            {
                by(split.clone().regex)
            }
            PreTokenizerWrapper::Digits(digits) if digits.individual_digits => {
                Box::new(|text: &str| char::is_numeric.find_matches(text))
            }
            _ => return None,
        });
    }
    if bytes.use_regex {
        cuts.push(by(SysRegex::new(GPT2).ok()?));
    }
    Some(cuts)
}

/// Whether a text without special tokens around it leaves the post-processor as it came.
fn keeps_offsets(post: &PostProcessorWrapper) -> bool {
    match post {
        PostProcessorWrapper::ByteLevel(bytes) => !bytes.trim_offsets,
        PostProcessorWrapper::Template(_) => true,
        PostProcessorWrapper::Sequence(sequence) => sequence.as_ref().iter().all(keeps_offsets),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

    /// A byte-level tokenizer with other pre-tokenizers, normalizers and post-processors.
    fn tokenizer(changes: &[(&str, Value)]) -> Tokenizer {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/runs/models/tiny-llama/tokenizer.json");
        let mut value: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        for (key, change) in changes {
            value[*key] = change.clone();
        }
        let mut tokenizer: Tokenizer = value.to_string().parse().unwrap();
        // One that is found before normalizing, one after it, one that takes the blanks before it along.
        let stripping = tokenizers::AddedToken::from("<sep>", true).lstrip(true);
        tokenizer.add_tokens([tokenizers::AddedToken::from("<|im_end|>", true), stripping]).unwrap();
        tokenizer.add_tokens([tokenizers::AddedToken::from("[word]", false)]).unwrap();
        tokenizer
    }

    fn byte_level(regex: bool, trim: bool) -> Value {
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": trim, "use_regex": regex})
    }

    /// The pre-tokenizers of Llama 3, Qwen and SmolLM, and GPT-2's.
    fn by_word() -> Vec<Tokenizer> {
        let split = json!({"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": false});
        let sequence = |steps: Value| json!({"type": "Sequence", "pretokenizers": steps});
        let llama3 = sequence(json!([split, byte_level(false, true)]));
        let smol = sequence(json!([{"type": "Digits", "individual_digits": true}, byte_level(true, true)]));
        vec![
            tokenizer(&[]),
            tokenizer(&[("pre_tokenizer", llama3.clone()), ("post_processor", byte_level(true, false))]),
            tokenizer(&[("pre_tokenizer", llama3), ("normalizer", json!({"type": "NFC"}))]),
            tokenizer(&[("pre_tokenizer", smol)]),
        ]
    }

    fn whole(tokenizer: &Tokenizer, text: &str) -> Tokens {
        let encoding = tokenizer.encode(text, false).unwrap();
        (encoding.get_ids().to_vec(), encoding.get_offsets().iter().map(|&(start, _)| start).collect())
    }

    #[test]
    fn tokenizers_whose_words_depend_on_their_neighbours_are_left_to_the_crate() {
        let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": true});
        let prefix = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
        for change in [
            ("pre_tokenizer", metaspace),
            ("pre_tokenizer", prefix),
            ("pre_tokenizer", Value::Null),
            ("normalizer", json!({"type": "NFKC"})),
            ("normalizer", json!({"type": "Lowercase"})),
            ("post_processor", byte_level(true, true)),
        ] {
            assert!(Words::of(&tokenizer(std::slice::from_ref(&change))).is_none(), "{change:?}");
        }
        let nfc = tokenizer(&[("normalizer", json!({"type": "NFC"}))]);
        assert_eq!(Words::of(&nfc).unwrap().encode(&nfc, "e\u{301}").unwrap(), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn words_give_the_tokens_of_the_whole_text(
            parts in prop::collection::vec(prop_oneof![
                "[ a-zA-Z0-9'.,\r\n\t]{0,20}",
                "\\PC{0,6}",
                "[ \u{e9}\u{301}\u{4e2d}\u{1f600}\u{a0}\u{2003}\u{b2}]{0,6}",
                Just("<|im_end|>\n".to_string()), Just(" <sep>".to_string()), Just("[word]".to_string()),
                "[a-z]{60,70}",
            ], 0..8),
        ) {
            let text = parts.concat();
            for tokenizer in by_word() {
                let words = Words::of(&tokenizer).unwrap();
                // Once with nothing known, once with all words known.
                for _ in 0..2 {
                    match words.encode(&tokenizer, &text).unwrap() {
                        Some(tokens) => prop_assert_eq!(tokens, whole(&tokenizer, &text)),
                        None => prop_assert!(!text.is_ascii() && words.only_ascii),
                    }
                }
            }
        }
    }
}
