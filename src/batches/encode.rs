//! One conversation becomes token ids, labels and spans: template, truncation, label masks (contract 2.4, 2.5),
//! as llamafactory/data/template.py and processor/supervised.py of each version do it.

use std::ops::Range;

use super::align::Conversation;
use super::template::{Slot, Template};
use super::tokenizer::Tokenizer;
use super::{Example, Field, IGNORE, RowId};
use crate::run::Version;
use crate::{Error, Result};

const THOUGHT_OPEN: &str = "<think>\n";
const THOUGHT_CLOSE: &str = "\n</think>\n\n";

/// What the configuration and the version say about encoding.
#[derive(Debug, Clone)]
pub struct Encoding {
    pub template: Template,
    pub cutoff_len: usize,
    pub train_on_prompt: bool,
    pub mask_history: bool,
    /// `Some(false)`: thoughts are removed; `None`: empty thoughts carry no loss; `Some(true)`: they do.
    pub enable_thinking: Option<bool>,
    pub preserve_thinking: bool,
    /// An efficient_eos template labels position 0 with eos (contract 2.5 b).
    pub eos_label_at_zero: bool,
    /// 0.9.3 looks for the thought words with their line breaks.
    pub strips_thought_words: bool,
    /// 0.9.5: with mask_history, thoughts of earlier turns are removed.
    pub discards_history_thoughts: bool,
}

impl Encoding {
    /// Version-dependent behaviour of reasoning templates.
    pub fn of_version(template: Template, version: Version) -> Self {
        Self {
            template,
            cutoff_len: usize::MAX,
            train_on_prompt: false,
            mask_history: false,
            enable_thinking: Some(true),
            preserve_thinking: false,
            eos_label_at_zero: version < super::template::V0_9_4,
            strips_thought_words: version >= super::template::V0_9_4,
            discards_history_thoughts: version >= Version(0, 9, 5),
        }
    }

    /// Encodes one conversation.
    ///
    /// # Errors
    /// A text that cannot be tokenized, or a row on which the trainer itself would stop.
    pub fn example(&self, row: RowId, conversation: &Conversation, tokenizer: &Tokenizer) -> Result<Example> {
        let mut turns = self
            .turns(conversation)
            .into_iter()
            .map(|turn| Ok((Piece::tokenize(&turn.source, tokenizer)?, Piece::tokenize(&turn.target, tokenizer)?)))
            .collect::<Result<Vec<_>>>()?;
        if self.mask_history {
            turns.reverse();
        }
        let efficient = self.template.efficient_eos;
        let mut total = usize::from(efficient);
        let mut parts: Vec<(Piece, Vec<i32>)> = Vec::with_capacity(2 * turns.len() + 1);
        for (index, (mut source, mut target)) in turns.into_iter().enumerate() {
            if total >= self.cutoff_len {
                break;
            }
            let (source_len, target_len) = infer_seqlen(source.ids.len(), target.ids.len(), self.cutoff_len - total);
            source.truncate(source_len);
            target.truncate(target_len);
            total += source_len + target_len;
            let source_labels = self.source_labels(index, &source, tokenizer.eos)?;
            let target_labels =
                if self.mask_history && index != 0 { vec![IGNORE; target_len] } else { target.labels() };
            let at = if self.mask_history { 0 } else { parts.len() };
            parts.splice(at..at, [(source, source_labels), (target, target_labels)]);
        }
        if efficient {
            let eos = Piece { ids: vec![tokenizer.eos], spans: vec![(0..1, Field::Template)] };
            let labels = eos.labels();
            parts.push((eos, labels));
        }
        Ok(assemble(row, parts))
    }

    fn source_labels(&self, index: usize, source: &Piece, eos: u32) -> Result<Vec<i32>> {
        if self.train_on_prompt {
            return Ok(source.labels());
        }
        let mut labels = vec![IGNORE; source.ids.len()];
        if self.template.efficient_eos && (index != 0 || self.eos_label_at_zero) {
            // [eos] + [-100] * (length - 1): one label too many for an empty source, which the collator rejects.
            *labels.first_mut().ok_or_else(|| {
                Error::input("a turn's prompt is cut to nothing, and LLaMA-Factory then writes a label too many")
                    .next("the trainer stops on such a row; raise cutoff_len")
            })? = eos as i32;
        }
        Ok(labels)
    }

    /// The elements of each turn, thoughts included.
    pub fn turns(&self, conversation: &Conversation) -> Vec<Turn> {
        let turns = self.with_thoughts_removed(&conversation.turns);
        let last = turns.len().saturating_sub(1);
        let template = &self.template;
        let system = if conversation.system.is_empty() { &template.default_system } else { &conversation.system };
        let discards = self.discards_history();
        turns
            .iter()
            .enumerate()
            .map(|(index, (user, assistant))| {
                let mut source = Vec::new();
                let mut user_content = vec![(Field::User(turn_number(index)), user.clone())];
                if index == 0 {
                    source.extend(fill(template.prefix, &[], None));
                    if !system.is_empty() {
                        let system_elements = fill(template.system, &[(Field::System, system.clone())], None);
                        if template.system_in_user {
                            if let Some(Element::Text(pieces)) = system_elements.into_iter().next() {
                                user_content.splice(0..0, pieces);
                            }
                        } else {
                            source.extend(system_elements);
                        }
                    }
                }
                let number = (!template.system_in_user).then_some(index);
                source.extend(fill(template.user, &user_content, number));
                let answer = (Field::Assistant(turn_number(index)), assistant.clone());
                let mut target = fill(template.assistant, &[answer], None);
                if template.reasoning && (!discards || index == last) && !self.has_thought(assistant) {
                    let thought = Element::Text(vec![(Field::Template, format!("{THOUGHT_OPEN}{THOUGHT_CLOSE}"))]);
                    if self.enable_thinking == Some(true) {
                        target.insert(0, thought);
                    } else {
                        source.push(thought);
                    }
                }
                Turn { source, target }
            })
            .collect()
    }

    fn discards_history(&self) -> bool {
        self.template.reasoning && self.discards_history_thoughts && self.mask_history && !self.preserve_thinking
    }

    fn with_thoughts_removed(&self, turns: &[(String, String)]) -> Vec<(String, String)> {
        let mut turns = turns.to_vec();
        let last = turns.len().saturating_sub(1);
        for (index, (_, assistant)) in turns.iter_mut().enumerate() {
            let all = self.template.reasoning && self.enable_thinking == Some(false);
            if all || (self.discards_history() && index != last) {
                *assistant = remove_thought(assistant);
            }
        }
        turns
    }

    fn has_thought(&self, text: &str) -> bool {
        if self.strips_thought_words {
            text.contains(THOUGHT_OPEN.trim()) || text.contains(THOUGHT_CLOSE.trim())
        } else {
            text.contains(THOUGHT_OPEN) || text.contains(THOUGHT_CLOSE)
        }
    }
}

fn turn_number(index: usize) -> u16 {
    u16::try_from(index).unwrap_or(u16::MAX)
}

/// Deletes every `<think>\n…\n</think>\n\n` and the line breaks in front of what is left.
fn remove_thought(text: &str) -> String {
    let mut kept = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once(THOUGHT_OPEN) {
        let Some((_, after)) = after.split_once(THOUGHT_CLOSE) else { break };
        kept.push_str(before);
        rest = after;
    }
    kept.push_str(rest);
    kept.trim_start_matches('\n').to_string()
}

/// One prompt–answer pair as template elements.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn {
    pub source: Vec<Element>,
    pub target: Vec<Element>,
}

/// What is tokenized as one text, or a single special token (left out if the tokenizer has none).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Element {
    Text(Vec<(Field, String)>),
    Bos,
    Eos,
}

/// Fills slots: `{{content}}` once per slot, then `{{idx}}` once (in user turns, even inside the content).
fn fill(slots: &[Slot], content: &[(Field, String)], index: Option<usize>) -> Vec<Element> {
    slots
        .iter()
        .map(|slot| match slot {
            Slot::Bos => Element::Bos,
            Slot::Eos => Element::Eos,
            Slot::Text(text) => {
                let mut pieces = match text.split_once("{{content}}") {
                    None => vec![(Field::Template, (*text).to_string())],
                    Some((before, after)) => {
                        let mut pieces = vec![(Field::Template, before.to_string())];
                        pieces.extend(content.iter().cloned());
                        pieces.push((Field::Template, after.to_string()));
                        pieces
                    }
                };
                // A placeholder split over two pieces cannot be: every piece boundary is a template literal's
                // end, and none of them ends inside "{{idx}}".
                if let Some(index) = index
                    && let Some((_, text)) = pieces.iter_mut().find(|(_, text)| text.contains("{{idx}}"))
                {
                    *text = text.replacen("{{idx}}", &index.to_string(), 1);
                }
                pieces.retain(|(_, text)| !text.is_empty());
                Element::Text(pieces)
            }
        })
        .collect()
}

/// Tokens of a source or target with what they came from.
struct Piece {
    ids: Vec<u32>,
    spans: Vec<(Range<usize>, Field)>,
}

impl Piece {
    fn tokenize(elements: &[Element], tokenizer: &Tokenizer) -> Result<Self> {
        let mut piece = Piece { ids: Vec::new(), spans: Vec::new() };
        for element in elements {
            match element {
                Element::Bos => piece.ids.extend(tokenizer.bos),
                Element::Eos => piece.ids.push(tokenizer.eos),
                Element::Text(parts) => {
                    let text: String = parts.iter().map(|(_, text)| text.as_str()).collect();
                    if !text.is_empty() {
                        piece.append(parts, &text, tokenizer)?;
                        continue;
                    }
                }
            }
            piece.cover(piece.ids.len(), Field::Template);
        }
        Ok(piece)
    }

    fn append(&mut self, parts: &[(Field, String)], text: &str, tokenizer: &Tokenizer) -> Result<()> {
        let base = self.ids.len();
        let (ids, starts) = tokenizer.encode(text)?;
        let count = ids.len();
        self.ids.extend(ids);
        let mut boundary = 0;
        for (field, part) in parts {
            boundary += part.len();
            // The tokens that start in front of the boundary; the last part takes the rest.
            let end = if boundary == text.len() { count } else { starts.partition_point(|&s| s < boundary) };
            self.cover(base + end, *field);
        }
        Ok(())
    }

    /// Says that tokens up to `end` that are not yet covered come from `field`.
    fn cover(&mut self, end: usize, field: Field) {
        let begin = self.spans.last().map_or(0, |(range, _)| range.end);
        if begin >= end {
            return;
        }
        match self.spans.last_mut() {
            Some((range, last)) if *last == field => range.end = end,
            _ => self.spans.push((begin..end, field)),
        }
    }

    /// Cut at the END, as both source and target are.
    fn truncate(&mut self, length: usize) {
        self.ids.truncate(length);
        self.spans.retain_mut(|(range, _)| {
            range.end = range.end.min(length);
            range.start < range.end
        });
    }

    fn labels(&self) -> Vec<i32> {
        self.ids.iter().map(|&id| id as i32).collect()
    }
}

fn assemble(row: RowId, parts: Vec<(Piece, Vec<i32>)>) -> Example {
    let mut whole = Piece { ids: Vec::new(), spans: Vec::new() };
    let mut labels = Vec::new();
    for (piece, part_labels) in parts {
        let base = whole.ids.len();
        whole.ids.extend(piece.ids);
        labels.extend(part_labels);
        for (range, field) in piece.spans {
            whole.cover(base + range.end, field);
        }
    }
    Example { row, input_ids: whole.ids, labels, spans: whole.spans, pack: None }
}

/// Lengths of source and target after truncation to `cutoff` (processor_utils.infer_seqlen).
pub fn infer_seqlen(source: usize, target: usize, cutoff: usize) -> (usize, usize) {
    let max_target = if target.saturating_mul(2) < cutoff {
        cutoff
    } else if source.saturating_mul(2) < cutoff {
        cutoff - source
    } else {
        (cutoff as f64 * (target as f64 / (source + target) as f64)) as usize
    };
    let new_target = max_target.min(target);
    let new_source = cutoff.saturating_sub(new_target).min(source);
    (new_source, new_target)
}
