//! A row becomes a conversation, as llamafactory/data/converter.py aligns alpaca and sharegpt rows
//! (contract 2.2). Rows that LLaMA-Factory would drop at tokenization say why; rows it would crash on, or whose
//! tokens are not covered (tools, media), are errors.

use serde_json::Value;

use super::rows::{Row, Seen, kind};
use super::source::{Columns, Formatting};
use crate::{Error, Result};

/// One aligned row.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Conversation {
    /// Empty: none.
    pub system: String,
    /// (user, assistant), at least one pair.
    pub turns: Vec<(String, String)>,
}

/// An aligned row, or the reason it vanishes at tokenization.
pub type Aligned = std::result::Result<Conversation, String>;

/// # Errors
/// A value LLaMA-Factory cannot use (the process would have stopped), or one whose tokens are not covered.
pub fn align(row: &Row, columns: &Columns) -> Result<Aligned> {
    for column in &columns.unsupported {
        if !is_empty(row.get(column)) {
            return Err(Error::refused(format!(
                "column `{column}` (tools, images, videos, audios or kto_tag) is not empty"
            ))
            .next("runs with tools or media are not covered"));
        }
    }
    match columns.formatting {
        Formatting::Alpaca => alpaca(row, columns),
        Formatting::ShareGpt => sharegpt(row, columns),
    }
}

/// Columns that LLaMA-Factory would look up, against those the file has: `example[name]` on a column that no
/// row has stops it with a KeyError.
pub fn check_columns(columns: &Columns, seen: &Seen) -> Result<()> {
    let needed: Vec<&Option<String>> = match columns.formatting {
        Formatting::Alpaca => {
            vec![&columns.prompt, &columns.query, &columns.response, &columns.history, &columns.system]
        }
        Formatting::ShareGpt => vec![&columns.messages, &columns.system],
    };
    for name in needed.into_iter().flatten().chain(&columns.unsupported) {
        if !seen.columns.contains(name) {
            let mut found: Vec<&str> = seen.columns.iter().map(String::as_str).collect();
            found.sort_unstable();
            return Err(Error::input(format!("no row has the column `{name}`"))
                .next(format!("name the columns in dataset_info.json; found: {}", found.join(", "))));
        }
    }
    Ok(())
}

/// Python's falsehood, for the kinds of values a column can hold.
fn is_empty(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null) => true,
        Some(Value::String(text)) => text.is_empty(),
        Some(Value::Array(list)) => list.is_empty(),
        Some(Value::Object(object)) => object.is_empty(),
        Some(Value::Bool(value)) => !value,
        Some(Value::Number(value)) => value.as_f64() == Some(0.0),
    }
}

fn column<'r>(row: &'r Row, name: &Option<String>) -> Option<&'r Value> {
    name.as_ref().and_then(|name| row.get(name)).filter(|value| !value.is_null())
}

fn text(value: &Value, what: &str) -> Result<String> {
    match value {
        Value::String(text) => Ok(text.clone()),
        other => Err(Error::input(format!("{what} must be a text, found {}", kind(other)))
            .next("the trainer stops on such a row; is this the file it was trained on?")),
    }
}

fn system(row: &Row, columns: &Columns) -> Result<String> {
    column(row, &columns.system).map_or(Ok(String::new()), |value| text(value, "the system text"))
}

fn alpaca(row: &Row, columns: &Columns) -> Result<Aligned> {
    let mut turns = Vec::new();
    if let Some(Value::Array(history)) = column(row, &columns.history) {
        for pair in history {
            match pair.as_array().map(Vec::as_slice) {
                Some([user, assistant]) => {
                    turns.push((text(user, "a history prompt")?, text(assistant, "a history answer")?));
                }
                _ => return Err(Error::input("the history must be a list of [prompt, answer] pairs")),
            }
        }
    }
    let mut parts = Vec::new();
    for (name, what) in [(&columns.prompt, "the prompt"), (&columns.query, "the query")] {
        if let Some(value) = column(row, name).filter(|value| !is_empty(Some(value))) {
            parts.push(text(value, what)?);
        }
    }
    let system = system(row, columns)?;
    let Some(Value::String(response)) = column(row, &columns.response) else {
        return Ok(Err("it has no answer (the response column is not a text)".into()));
    };
    turns.push((parts.join("\n"), response.clone()));
    Ok(Ok(Conversation { system, turns }))
}

fn sharegpt(row: &Row, columns: &Columns) -> Result<Aligned> {
    let Some(Value::Array(messages)) = column(row, &columns.messages) else {
        return Err(Error::input("its messages are not a list").next("every row needs a list, even an empty one"));
    };
    let mut messages = messages.as_slice();
    let (role_tag, content_tag) = match (&columns.role_tag, &columns.content_tag) {
        (Some(role), Some(content)) => (role, content),
        _ => return Err(Error::input("`tags` must name role_tag and content_tag").at("dataset_info.json")),
    };
    let role_of = |message: &Value| message.get(role_tag).and_then(Value::as_str).map(str::to_string);
    let mut system_text = None;
    if let (Some(tag), Some(first)) = (&columns.system_tag, messages.first())
        && role_of(first).as_ref() == Some(tag)
    {
        system_text = Some(
            first
                .get(content_tag)
                .filter(|v| !v.is_null())
                .map_or(Ok(String::new()), |v| text(v, "the system message"))?,
        );
        messages = &messages[1..];
    }
    let system = match system_text {
        Some(text) => text,
        None => system(row, columns)?,
    };
    let mut texts = Vec::with_capacity(messages.len());
    for (position, message) in messages.iter().enumerate() {
        let role = role_of(message).ok_or_else(|| Error::input(format!("message {position} has no `{role_tag}`")))?;
        let (plain, tool) = if position % 2 == 0 {
            (&columns.user_tag, &columns.observation_tag)
        } else {
            (&columns.assistant_tag, &columns.function_tag)
        };
        if tool.as_ref() == Some(&role) && plain.as_ref() != Some(&role) {
            return Err(Error::refused(format!("message {position} is a tool turn (`{role}`)"))
                .next("runs with tool turns are not covered"));
        }
        if plain.as_ref() != Some(&role) {
            return Ok(Err(format!("message {position} has the role `{role}` out of turn")));
        }
        let content = message.get(content_tag).unwrap_or(&Value::Null);
        texts.push(text(content, &format!("message {position}"))?);
    }
    if texts.len() % 2 != 0 {
        return Ok(Err("it has an odd number of messages".into()));
    }
    let mut texts = texts.into_iter();
    let mut turns = Vec::new();
    while let (Some(user), Some(assistant)) = (texts.next(), texts.next()) {
        turns.push((user, assistant));
    }
    if turns.is_empty() {
        return Ok(Err("it has no messages".into()));
    }
    Ok(Ok(Conversation { system, turns }))
}
