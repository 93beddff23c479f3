//! Template elements and encoded rows against LLaMA-Factory 0.9.5.

use serde_json::Value;
use spikeprobe::batches::{Conversation, Element, Encoding, NAMES, RowId, Tokenizer, template};

use super::common::*;

/// Elements as the vectors write them: texts, "BOS", "EOS"; empty texts left out.
fn written(elements: &[Element]) -> Vec<String> {
    let text = |element: &Element| match element {
        Element::Bos => "BOS".to_string(),
        Element::Eos => "EOS".to_string(),
        Element::Text(pieces) => pieces.iter().map(|(_, text)| text.as_str()).collect(),
    };
    elements.iter().map(text).filter(|text| !text.is_empty()).collect()
}

fn conversation(messages: &Value, system: &str) -> Conversation {
    let text = |message: &Value| message[1].as_str().unwrap().to_string();
    let messages = messages.as_array().unwrap();
    Conversation {
        system: system.into(),
        turns: messages.chunks(2).map(|pair| (text(&pair[0]), text(&pair[1]))).collect(),
    }
}

/// `single|system='SYS'|enable_thinking=False` → (conversation, system, enable_thinking).
fn options(case: &str) -> (&str, &str, Option<bool>) {
    let mut parts = case.split('|');
    let (name, system) = (parts.next().unwrap(), parts.next().unwrap());
    let thinking = match parts.next() {
        None | Some("enable_thinking=True") => Some(true),
        Some("enable_thinking=False") => Some(false),
        Some("enable_thinking=None") => None,
        Some(other) => panic!("unknown option {other}"),
    };
    (name, system.strip_prefix("system='").unwrap().strip_suffix('\'').unwrap(), thinking)
}

#[test]
fn every_template_makes_the_elements_of_llamafactory_0_9_5() {
    let vectors = vector("templates.json");
    let templates = vectors["templates"].as_object().unwrap();
    assert_eq!(templates.len(), NAMES.len(), "a template is without a known answer");
    for (name, expected) in templates {
        let found = template(name, version("0.9.5")).unwrap();
        assert_eq!(found.efficient_eos, expected["efficient_eos"], "{name}");
        assert_eq!(found.replace_eos, expected["replace_eos"], "{name}");
        assert_eq!(found.default_system, expected["default_system"].as_str().unwrap(), "{name}");
        let stop_words: Vec<&str> =
            expected["stop_words"].as_array().unwrap().iter().map(|word| word.as_str().unwrap()).collect();
        assert_eq!(found.stop_words, stop_words, "{name}");
        for (case, expected) in expected["cases"].as_object().unwrap() {
            let (messages, system, thinking) = options(case);
            let encoding =
                Encoding { enable_thinking: thinking, ..Encoding::of_version(found.clone(), version("0.9.5")) };
            let turns = encoding.turns(&conversation(&vectors["conversations"][messages], system));
            let turns: Vec<[Vec<String>; 2]> =
                turns.iter().map(|turn| [written(&turn.source), written(&turn.target)]).collect();
            assert_eq!(serde_json::to_value(&turns).unwrap(), *expected, "{name}, {case}");
        }
    }
}

/// Rows encoded by LLaMA-Factory 0.9.5 with SmolLM2's tokenizer (here cut down to what these rows can use).
#[test]
fn encoded_rows_equal_llamafactorys_ids_and_labels() {
    let vectors = vector("encode_smollm2.json");
    let cases = vectors["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 22);
    let folder = std::env::var_os("SPIKEPROBE_SMOLLM2").map_or(fixtures().join("batches/smollm2_reduced"), Into::into);
    let whole: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(folder.join("tokenizer.json")).unwrap()).unwrap();
    let size = whole["model"]["vocab"].as_object().unwrap().len() as u32;
    // New tokens are numbered by the size of the vocabulary, which is smaller here.
    let renumbered = |id: u32| if id >= 49152 { id - 49152 + size } else { id };
    for case in cases {
        let options = &case["options"];
        let flag = |key: &str| options[key].as_bool();
        let found = template(case["template"].as_str().unwrap(), version("0.9.5")).unwrap();
        let tokenizer = Tokenizer::load(&folder, &found).unwrap();
        assert_eq!(
            (u64::from(tokenizer.eos), u64::from(tokenizer.pad)),
            (integer(&case["eos_id"]), integer(&case["pad_id"]))
        );
        let encoding = Encoding {
            cutoff_len: options["cutoff_len"].as_u64().unwrap_or(2048) as usize,
            train_on_prompt: flag("train_on_prompt").unwrap_or(false),
            mask_history: flag("mask_history").unwrap_or(false),
            enable_thinking: Some(flag("enable_thinking").unwrap_or(true)),
            ..Encoding::of_version(found, version("0.9.5"))
        };
        let data = &case["data"];
        let messages: Vec<&str> = data["_prompt"]
            .as_array()
            .unwrap()
            .iter()
            .chain(data["_response"].as_array().unwrap())
            .map(|message| message["content"].as_str().unwrap())
            .collect();
        let conversation = Conversation {
            system: data["_system"].as_str().unwrap().into(),
            turns: messages.chunks(2).map(|pair| (pair[0].into(), pair[1].into())).collect(),
        };
        let row = RowId { dataset: 0, row: 0 };
        let example = encoding.example(row, &conversation, &tokenizer).unwrap();
        let what = format!("{} {options} {}", case["template"], case["example"]);
        assert_eq!(
            example.input_ids,
            integers(&case["input_ids"]).into_iter().map(renumbered).collect::<Vec<_>>(),
            "{what}"
        );
        let label = |label: &serde_json::Value| match label.as_i64().unwrap() {
            -100 => -100,
            id => renumbered(id as u32) as i32,
        };
        let labels: Vec<i32> = case["labels"].as_array().unwrap().iter().map(label).collect();
        assert_eq!(example.labels, labels, "{what}");
    }
}
