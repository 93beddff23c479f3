//! The chat template against the tokenizer: markers that the model never saw as one token, an end of text it lacks.

use std::path::Path;

use super::{Code, Finding, Severity};
use crate::batches::{Slot, Template, template};
use crate::run::Run;

/// Findings about `template`; nothing where the tokenizer is not at hand or the template not covered.
pub fn findings(run: &Run) -> Vec<Finding> {
    let folder = run.path(&run.config.model_name_or_path);
    let Ok(tokenizer) = std::fs::read_to_string(folder.join("tokenizer.json")) else { return Vec::new() };
    let Ok(template) = template(&run.config.template, crate::batches::llamafactory_version(run)) else {
        return Vec::new();
    };
    let own = chat_template(&folder);
    judge(&template, &tokenizer, own.as_deref(), &run.place("template"))
}

/// The tokenizer's own chat template, from tokenizer_config.json or chat_template.jinja.
fn chat_template(folder: &Path) -> Option<String> {
    let file = std::fs::read_to_string(folder.join("chat_template.jinja")).ok();
    file.or_else(|| {
        let config = std::fs::read_to_string(folder.join("tokenizer_config.json")).ok()?;
        let config: serde_json::Value = serde_json::from_str(&config).ok()?;
        Some(config.get("chat_template")?.as_str()?.to_owned())
    })
}

/// `tokenizer`: text of tokenizer.json. `own`: the chat template that came with the model.
pub fn judge(template: &Template, tokenizer: &str, own: Option<&str>, place: &str) -> Vec<Finding> {
    let mut found = Vec::new();
    let mut add = |text: String| {
        found.push(Finding::new(Code::TemplateMismatch, Severity::Warning, place, text));
    };
    let markers = markers(template);
    // A token stands in tokenizer.json as a JSON string, in the vocabulary or among the added tokens.
    let known = |token: &str| serde_json::to_string(token).is_ok_and(|quoted| tokenizer.contains(&quoted));
    let name = template.name;
    let end = template.stop_words.first().filter(|word| template.replace_eos && !known(word));
    if let Some(word) = end {
        add(format!(
            "template `{name}` ends answers with {word}, which this tokenizer does not have: LLaMA-Factory adds it as a new \
             token whose embedding was never trained (and may lie outside the table); take the template of the model's \
             family"
        ));
    }
    let split: Vec<&str> = markers.iter().copied().filter(|m| !known(m) && !template.stop_words.contains(m)).collect();
    if !split.is_empty() {
        add(format!(
            "template `{name}` writes {}, which this tokenizer spells out in pieces: the model was pretrained with another \
             template, and learns these marks from scratch",
            split.join(", ")
        ));
    }
    if let Some(own) = own
        && !markers.is_empty()
        && split.is_empty()
        && !markers.iter().any(|marker| own.contains(marker))
    {
        add(format!(
            "template `{name}` shares no marker ({}) with the chat template that came with the model: an instruct model \
             has to unlearn its own format; a base model does not mind",
            markers.join(", ")
        ));
    }
    found
}

/// `<…>` markers of a template's texts, each once. Zephyr's are plain text on purpose, and so is llama2's `<<SYS>>`.
fn markers(template: &Template) -> Vec<&'static str> {
    let mut all: Vec<&'static str> = Vec::new();
    if template.name == "zephyr" {
        return all;
    }
    let slots = [template.prefix, template.system, template.user, template.assistant].into_iter().flatten();
    for slot in slots {
        let Slot::Text(text) = slot else { continue };
        let mut rest = *text;
        while let Some(start) = rest.find('<') {
            let Some(end) = rest[start..].find('>') else { break };
            let marker = &rest[start..=start + end];
            if !marker.starts_with("<<") && !marker.starts_with("</") && !all.contains(&marker) {
                all.push(marker);
            }
            rest = &rest[start + end + 1..];
        }
    }
    all
}
