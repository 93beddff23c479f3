//! Which part of a text each token stands for. The encoder hands out ids only, so the parts are found again
//! from the tokens' own texts.

use std::collections::HashMap;

use serde_json::Value;

/// The text of every token.
pub struct Surfaces {
    /// By id; for a byte-level vocabulary each character stands for one byte.
    texts: Vec<Box<str>>,
    byte_level: bool,
    /// Ids whose text is literal even in a byte-level vocabulary.
    added: Vec<bool>,
}

impl Surfaces {
    /// From a tokenizer.json document and all its tokens.
    pub fn new(document: &Value, tokens: &HashMap<String, u32>) -> Self {
        let size = tokens.values().max().map_or(0, |&last| last as usize + 1);
        // A sparse id would make the table absurdly long; such a token gets no text.
        let size = size.min(tokens.len() * 4 + 1024);
        let mut texts = vec![Box::<str>::default(); size];
        for (token, &id) in tokens {
            if let Some(text) = texts.get_mut(id as usize) {
                *text = token.as_str().into();
            }
        }
        let mut added = vec![false; size];
        for entry in document.get("added_tokens").and_then(Value::as_array).into_iter().flatten() {
            let id = entry.get("id").and_then(Value::as_u64).and_then(|id| usize::try_from(id).ok());
            if let Some(flag) = id.and_then(|id| added.get_mut(id)) {
                *flag = true;
            }
        }
        let byte_level = document.get("decoder").is_some_and(|decoder| decoder.to_string().contains("\"ByteLevel\""));
        Self { texts, byte_level, added }
    }

    /// Byte offset at which each token starts; ascending, within the text.
    pub fn starts(&self, text: &str, ids: &[u32]) -> Vec<usize> {
        let mut position = 0;
        ids.iter()
            .map(|&id| {
                let start = position;
                position = (position + self.length(&text.as_bytes()[position..], id)).min(text.len());
                start
            })
            .collect()
    }

    /// Bytes of `rest` that token `id` covers.
    fn length(&self, rest: &[u8], id: u32) -> usize {
        let Some(token) = self.texts.get(id as usize) else { return 0 };
        if self.byte_level && !self.added.get(id as usize).copied().unwrap_or(false) {
            return token.chars().count();
        }
        // Byte fallback: <0x0A>.
        if token.len() == 6 && token.starts_with("<0x") {
            return 1;
        }
        let spaced = token.replace('\u{2581}', " ");
        if rest.starts_with(spaced.as_bytes()) {
            return spaced.len();
        }
        // The dummy prefix: a leading space that the text does not have.
        let bare = spaced.trim_start_matches(' ');
        if rest.starts_with(bare.as_bytes()) {
            return bare.len();
        }
        spaced.len().min(rest.len())
    }
}
