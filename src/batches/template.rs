//! The chat templates of LLaMA-Factory as data (contract 2.4), by version. How a template's pieces become
//! tokens is in `encode.rs`; which special tokens it registers is applied in `tokenizer.rs`.

use crate::run::Version;
use crate::{Error, Result};

/// One element of a turn; every text is tokenized by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Slot {
    /// May hold `{{content}}` (replaced once by the turn's text).
    Text(&'static str),
    Bos,
    Eos,
}

/// A template in the shape of llamafactory/data/template.py.
#[derive(Debug, Clone)]
pub struct Template {
    pub name: &'static str,
    pub prefix: &'static [Slot],
    pub system: &'static [Slot],
    pub user: &'static [Slot],
    pub assistant: &'static [Slot],
    /// Used when an example has no system text.
    pub default_system: String,
    /// Registered as special tokens; the first becomes eos with `replace_eos`.
    pub stop_words: &'static [&'static str],
    pub replace_eos: bool,
    /// No eos in the assistant's turns; one eos ends the whole row.
    pub efficient_eos: bool,
    /// Llama2Template: the system text is put in front of the first user text.
    pub system_in_user: bool,
    /// ReasoningTemplate: turns without a thought get an empty one.
    pub reasoning: bool,
}

/// Version of LLaMA-Factory in which behaviour changed (templates, thoughts, label of position 0).
pub const V0_9_3: Version = Version(0, 9, 3);
pub const V0_9_4: Version = Version(0, 9, 4);

use Slot::{Bos, Eos, Text};

const CONTENT: &[Slot] = &[Text("{{content}}")];
const CONTENT_EOS: &[Slot] = &[Text("{{content}}"), Eos];
const CONTENT_BLANK_LINE: &[Slot] = &[Text("{{content}}\n\n")];
const IM_SYSTEM: &[Slot] = &[Text("<|im_start|>system\n{{content}}<|im_end|>\n")];
const IM_USER: &[Slot] = &[Text("<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n")];
const IM_ASSISTANT: &[Slot] = &[Text("{{content}}<|im_end|>\n")];
const GEMMA_USER: &[Slot] = &[Text("<start_of_turn>user\n{{content}}<end_of_turn>\n<start_of_turn>model\n")];
const GEMMA_ASSISTANT: &[Slot] = &[Text("{{content}}<end_of_turn>\n")];

/// Every template name this program knows, in the newest version.
pub const NAMES: &[&str] = &[
    "default",
    "empty",
    "alpaca",
    "chatml",
    "llama2",
    "llama3",
    "qwen",
    "qwen3",
    "qwen3_nothink",
    "mistral",
    "gemma",
    "gemma2",
    "phi",
    "phi4",
    "deepseek",
    "deepseek3",
    "glm4",
    "vicuna",
    "zephyr",
    "smollm",
    "smollm2",
    "yi",
];

/// register_template's defaults.
fn plain(name: &'static str) -> Template {
    Template {
        name,
        prefix: &[],
        system: CONTENT,
        user: CONTENT,
        assistant: CONTENT_EOS,
        default_system: String::new(),
        stop_words: &[],
        replace_eos: false,
        efficient_eos: false,
        system_in_user: false,
        reasoning: false,
    }
}

/// The ChatML family: chatml, qwen, yi, smollm differ in eos, stop words and default system only.
fn im(name: &'static str) -> Template {
    Template { system: IM_SYSTEM, user: IM_USER, assistant: IM_ASSISTANT, stop_words: &["<|im_end|>"], ..plain(name) }
}

/// The template as LLaMA-Factory `version` registers it.
///
/// # Errors
/// A name this program does not know, or that `version` does not have.
pub fn template(name: &str, version: Version) -> Result<Template> {
    let modern = version >= V0_9_3;
    let since = match name {
        "qwen3" => V0_9_3,
        "gemma2" | "qwen3_nothink" => V0_9_4,
        // smollm and smollm2 came between 0.9.2 and 0.9.3.
        "smollm" | "smollm2" => V0_9_3,
        _ => Version(0, 0, 0),
    };
    if version < since {
        let Version(major, minor, patch) = version;
        return Err(Error::input(format!("template `{name}` does not exist in LLaMA-Factory {major}.{minor}.{patch}"))
            .at("template")
            .next("give the version the run really used with --versions llamafactory=…"));
    }
    let found = simple(name, modern).or_else(|| family(name, modern));
    found.ok_or_else(|| {
        Error::refused(format!("template `{name}` is not covered"))
            .at("template")
            .next(format!("covered templates: {}", NAMES.join(", ")))
    })
}

/// Templates around plain text markers.
fn simple(name: &str, modern: bool) -> Option<Template> {
    Some(match name {
        "default" if modern => Template {
            system: &[Text("System: {{content}}"), Eos, Text("\n")],
            user: &[Text("Human: {{content}}"), Eos, Text("\nAssistant:")],
            assistant: &[Text("{{content}}"), Eos, Text("\n")],
            ..plain("default")
        },
        "default" => Template {
            system: &[Text("System: {{content}}\n")],
            user: &[Text("Human: {{content}}\nAssistant:")],
            assistant: &[Text("{{content}}"), Eos, Text("\n")],
            ..plain("default")
        },
        "empty" => Template { assistant: CONTENT, ..plain("empty") },
        "alpaca" => Template {
            user: &[Text("### Instruction:\n{{content}}\n\n### Response:\n")],
            assistant: &[Text("{{content}}"), Eos, Text("\n\n")],
            default_system: "Below is an instruction that describes a task. Write a response that appropriately \
                             completes the request.\n\n"
                .into(),
            ..plain("alpaca")
        },
        "deepseek" => Template {
            prefix: &[Bos],
            system: CONTENT_BLANK_LINE,
            user: &[Text("User: {{content}}\n\nAssistant:")],
            ..plain("deepseek")
        },
        "deepseek3" => {
            Template { prefix: &[Bos], user: &[Text("<｜User｜>{{content}}<｜Assistant｜>")], ..plain("deepseek3") }
        }
        "vicuna" => Template {
            user: &[Text("USER: {{content}} ASSISTANT:")],
            default_system: "A chat between a curious user and an artificial intelligence assistant. The assistant \
                             gives helpful, detailed, and polite answers to the user's questions."
                .into(),
            ..plain("vicuna")
        },
        "zephyr" => Template {
            system: &[Text("<|system|>\n{{content}}"), Eos],
            user: &[Text("<|user|>\n{{content}}"), Eos, Text("<|assistant|>\n")],
            default_system: "You are Zephyr, a helpful assistant.".into(),
            ..plain("zephyr")
        },
        _ => return None,
    })
}

/// Templates of model families with their own marker tokens.
fn family(name: &str, modern: bool) -> Option<Template> {
    Some(match name {
        "chatml" => Template { stop_words: &["<|im_end|>", "<|im_start|>"], replace_eos: true, ..im("chatml") },
        "qwen" => {
            let default_system = if modern {
                "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
            } else {
                "You are a helpful assistant."
            };
            Template { replace_eos: modern, default_system: default_system.into(), ..im("qwen") }
        }
        "qwen3" => Template { replace_eos: true, reasoning: true, ..im("qwen3") },
        "qwen3_nothink" => Template { replace_eos: true, ..im("qwen3_nothink") },
        "yi" => im("yi"),
        "smollm" => im("smollm"),
        "smollm2" => Template {
            default_system: "You are a helpful AI assistant named SmolLM, trained by Hugging Face.".into(),
            ..im("smollm2")
        },
        "phi4" => Template {
            system: &[Text("<|im_start|>system<|im_sep|>{{content}}<|im_end|>")],
            user: &[Text("<|im_start|>user<|im_sep|>{{content}}<|im_end|><|im_start|>assistant<|im_sep|>")],
            assistant: &[Text("{{content}}<|im_end|>")],
            stop_words: &["<|im_end|>"],
            replace_eos: modern,
            ..plain("phi4")
        },
        "phi" => Template {
            system: &[Text("<|system|>\n{{content}}<|end|>\n")],
            user: &[Text("<|user|>\n{{content}}<|end|>\n<|assistant|>\n")],
            assistant: &[Text("{{content}}<|end|>\n")],
            stop_words: &["<|end|>"],
            replace_eos: modern,
            ..plain("phi")
        },
        "llama2" => Template {
            system: &[Text("<<SYS>>\n{{content}}\n<</SYS>>\n\n")],
            user: &[Bos, Text("[INST] {{content}} [/INST]")],
            system_in_user: true,
            ..plain("llama2")
        },
        "llama3" => Template {
            prefix: &[Bos],
            system: &[Text("<|start_header_id|>system<|end_header_id|>\n\n{{content}}<|eot_id|>")],
            user: &[Text(
                "<|start_header_id|>user<|end_header_id|>\n\n{{content}}<|eot_id|>\
                 <|start_header_id|>assistant<|end_header_id|>\n\n",
            )],
            assistant: &[Text("{{content}}<|eot_id|>")],
            stop_words: &["<|eot_id|>", "<|eom_id|>"],
            replace_eos: modern,
            ..plain("llama3")
        },
        "mistral" => Template {
            prefix: &[Bos],
            system: CONTENT_BLANK_LINE,
            user: &[Text("[INST] {{content}}[/INST]")],
            assistant: &[Text(" {{content}}"), Eos],
            system_in_user: true,
            ..plain("mistral")
        },
        // 0.9.2 registers no stop word and no replace_eos, and keeps the system text an element of its own.
        "gemma" if !modern => {
            Template { prefix: &[Bos], user: GEMMA_USER, assistant: GEMMA_ASSISTANT, ..plain("gemma") }
        }
        "gemma" => {
            Template { stop_words: &["<end_of_turn>"], replace_eos: true, efficient_eos: false, ..gemma2("gemma") }
        }
        "gemma2" => gemma2("gemma2"),
        "glm4" => Template {
            prefix: &[Text("[gMASK]<sop>")],
            system: &[Text("<|system|>\n{{content}}")],
            user: &[Text("<|user|>\n{{content}}<|assistant|>")],
            assistant: &[Text("\n{{content}}")],
            stop_words: &["<|user|>", "<|observation|>"],
            efficient_eos: true,
            ..plain("glm4")
        },
        _ => return None,
    })
}

fn gemma2(name: &'static str) -> Template {
    Template {
        prefix: &[Bos],
        system: CONTENT_BLANK_LINE,
        user: GEMMA_USER,
        assistant: GEMMA_ASSISTANT,
        stop_words: &["<eos>", "<end_of_turn>"],
        efficient_eos: true,
        system_in_user: true,
        ..plain(name)
    }
}
