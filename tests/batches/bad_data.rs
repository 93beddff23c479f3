//! Data a user can get wrong: each message names the file, the row or the key, and what to do.

use std::path::Path;

use serde_json::{Value, json};
use spikeprobe::Result;
use spikeprobe::batches::{Corpus, Field, RowId};

use super::common::*;

/// A folder with the tiny tokenizer, one dataset file and its entry in dataset_info.json.
struct Folder {
    dir: tempfile::TempDir,
    yaml: String,
}

impl Folder {
    fn new(file: &str, text: &str) -> Self {
        Self::with_entry(file, text, json!({}))
    }

    fn with_entry(file: &str, text: &str, mut entry: Value) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["tokenizer.json", "tokenizer_config.json", "config.json"] {
            std::fs::create_dir_all(dir.path().join("model")).unwrap();
            std::fs::copy(fixtures().join("batches/tiny").join(name), dir.path().join("model").join(name)).unwrap();
        }
        entry["file_name"] = file.into();
        std::fs::create_dir(dir.path().join("data")).unwrap();
        let folder = Self { dir, yaml: String::new() };
        folder.write(&format!("data/{file}"), text);
        folder.write("data/dataset_info.json", &json!({ "d": entry }).to_string());
        folder
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path().join(name), text).unwrap();
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn yaml(mut self, lines: &str) -> Self {
        self.yaml = lines.into();
        self
    }

    fn load_as(&self, versions: &[(&str, &str)]) -> Result<Corpus> {
        let required = "model_name_or_path: model\ndataset: d\ntemplate: chatml\noutput_dir: out\ndataset_dir: data\n";
        // The last of two equal keys would be an error, so a test's own lines replace these.
        let own: Vec<&str> = self.yaml.lines().filter_map(|line| line.split_once(':')).map(|(key, _)| key).collect();
        let kept: Vec<&str> =
            required.lines().filter(|line| !own.iter().any(|key| line.starts_with(&format!("{key}:")))).collect();
        let run = open(self.path(), &format!("{}\n{}", kept.join("\n"), self.yaml), versions)?;
        Corpus::load(&run, &run.config)
    }

    fn load(&self) -> Result<Corpus> {
        self.load_as(NEWEST)
    }

    #[track_caller]
    fn refused(&self, parts: &[&str]) {
        let message = self.load().expect_err("an error").to_string();
        for part in parts {
            assert!(message.contains(part), "`{part}` is missing in: {message}");
        }
    }
}

const GOOD: &str = r#"[{"instruction": "Hello", "input": "", "output": "Hi"}]"#;

#[test]
fn missing_files_and_undefined_datasets_are_named() {
    let folder = Folder::new("d.json", GOOD);
    std::fs::remove_file(folder.path().join("data/d.json")).unwrap();
    folder.refused(&["dataset `d`", "d.json", "does not exist"]);
    std::fs::remove_file(folder.path().join("data/dataset_info.json")).unwrap();
    folder.refused(&["dataset_info.json", "dataset_dir"]);
    Folder::new("d.json", GOOD).yaml("dataset: e\n").refused(&["dataset `e`", "not defined", "defined here: d"]);
    Folder::new("d.parquet", "PAR1").refused(&["parquet", "jsonl"]);
    Folder::with_entry("d.json", GOOD, json!({"hf_hub_url": "x/y"})).refused(&["hf_hub_url", "download"]);
    Folder::with_entry("d.json", GOOD, json!({"ranking": true})).refused(&["ranking"]);
}

#[test]
fn broken_json_names_file_line_and_column() {
    Folder::new("d.json", "[{\"instruction\": \"a\",\n \"output\": \"b\"},\n {\"instr").refused(&["d.json", "line 3"]);
    Folder::new("d.jsonl", "{\"instruction\": \"a\", \"input\": \"\", \"output\": \"b\"}\n{oops}\n")
        .refused(&["d.jsonl", "line 2"]);
    Folder::new("d.json", "[1, 2]").refused(&["d.json", "row 0", "a number"]);
}

#[test]
fn wrong_types_and_missing_columns_name_row_and_column() {
    let rows = r#"[{"instruction": "a", "input": "", "output": "b"}, {"instruction": 7, "input": "", "output": "b"}]"#;
    Folder::new("d.json", rows).refused(&["dataset `d`", "row 1", "the prompt", "a number"]);
    Folder::new("d.json", r#"[{"question": "a", "output": "b"}]"#).refused(&[
        "dataset `d`",
        "instruction",
        "output, question",
    ]);
    let sharegpt = json!({"formatting": "sharegpt"});
    Folder::with_entry("d.json", r#"[{"conversations": null}]"#, sharegpt.clone()).refused(&["row 0", "not a list"]);
    let tool = r#"[{"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "{}"}]}]"#;
    Folder::with_entry("d.json", tool, sharegpt).refused(&["row 0", "tool turn"]);
    let tools = json!({"columns": {"prompt": "instruction", "response": "output", "tools": "tools"}});
    Folder::with_entry("d.json", r#"[{"instruction": "a", "output": "b", "tools": "[{}]"}]"#, tools)
        .refused(&["row 0", "`tools`"]);
}

#[test]
fn empty_and_wholly_dropped_datasets_are_errors_with_the_reason() {
    Folder::new("d.json", "[]").refused(&["no usable training row", "dataset d"]);
    Folder::new("d.json", "").refused(&["no usable training row"]);
    Folder::new("d.json", r#"[{"instruction": "a", "input": "", "output": null}]"#).refused(&[
        "no usable training row",
        "row 0",
        "no answer",
    ]);
}

#[test]
fn a_missing_or_foreign_tokenizer_is_an_error_before_anything_is_tokenized() {
    let folder = Folder::new("d.json", GOOD);
    std::fs::remove_file(folder.path().join("model/tokenizer.json")).unwrap();
    folder.refused(&["tokenizer.json", "save_pretrained"]);
    folder.write("model/tokenizer.model", "");
    folder.refused(&["tokenizer.model", "not read"]);
    folder.write("model/tokenizer.json", "{\"version\": \"1.0\"");
    folder.refused(&["tokenizer.json", "not a tokenizer"]);
    let folder = Folder::new("d.json", GOOD);
    folder.write("model/config.json", r#"{"vocab_size": 100, "model_type": "llama"}"#);
    folder.refused(&["vocabulary of 100", "dataset `d` row 0"]);
}

#[test]
fn rows_without_any_label_load_and_carry_no_label() {
    let prompt = "word ".repeat(400);
    let rows =
        json!([{"instruction": prompt, "input": "", "output": "a long answer of a few words, longer than half"}]);
    let folder = Folder::new("d.json", &rows.to_string()).yaml("cutoff_len: 20\n");
    let corpus = folder.load().unwrap();
    assert_eq!(corpus.train[0].unshifted_label_tokens(), 0);
    assert_eq!(corpus.train[0].input_ids.len(), 20);
}

#[test]
fn dropped_rows_count_for_the_split_of_0_9_5_and_not_for_that_of_0_9_2() {
    let rows: Vec<Value> = (0..20)
        .map(|i| json!({"instruction": format!("q{i}"), "input": "", "output": if i % 4 == 1 { Value::Null } else { "a".into() }}))
        .collect();
    let folder = Folder::new("d.json", &Value::from(rows).to_string()).yaml("val_size: 0.25\n");
    let sizes = |versions| {
        let corpus = folder.load_as(versions).unwrap();
        assert_eq!(corpus.dropped.len(), 5);
        assert_eq!(corpus.train.len() + corpus.eval[0].1.len(), 15);
        corpus.eval[0].1.len()
    };
    // 0.9.2: a quarter of the 15 usable rows, rounded up. 0.9.5: of all 20, dropped ones among them.
    assert_eq!(sizes(OLDER), 4);
    assert!(sizes(NEWEST) <= 5);
}

#[test]
fn sharegpt_rows_keep_system_and_turns_and_broken_ones_are_dropped() {
    let turn = |from: &str, value: &str| json!({"from": from, "value": value});
    let rows = json!([
        {"conversations": [turn("system", "Be brief."), turn("human", "One?"), turn("gpt", "1"), turn("human", "Two?"), turn("gpt", "2")]},
        {"conversations": [turn("gpt", "first")]},
        {"conversations": [turn("human", "odd")]},
    ]);
    let folder = Folder::with_entry("d.json", &rows.to_string(), json!({"formatting": "sharegpt"}));
    let corpus = folder.load().unwrap();
    let rows: Vec<u32> = corpus.dropped.iter().map(|(row, _)| row.row).collect();
    assert_eq!((corpus.train.len(), rows), (1, vec![1, 2]));
    let text = corpus.row_text(RowId { dataset: 0, row: 0 }).unwrap();
    assert_eq!(text.system, "Be brief.");
    assert_eq!(text.turns, [("One?".into(), "1".into()), ("Two?".into(), "2".into())]);
    let fields: Vec<Field> = corpus.train[0].spans.iter().map(|(_, field)| *field).collect();
    for field in [Field::System, Field::User(0), Field::Assistant(0), Field::User(1), Field::Assistant(1)] {
        assert_eq!(fields.iter().filter(|found| **found == field).count(), 1, "{field:?} in {fields:?}");
    }
}

#[test]
fn csv_and_json_lines_hold_the_same_rows_as_a_list() {
    let columns = json!({"columns": {"prompt": "q", "response": "a", "history": "h"}});
    let list = r#"[{"q": "One, \"two\"?", "a": "1", "h": [["x", "y"]]}, {"q": "3", "a": "4", "h": null}]"#;
    let lines =
        "{\"q\": \"One, \\\"two\\\"?\", \"a\": \"1\", \"h\": [[\"x\", \"y\"]]}\n\n{\"q\": \"3\", \"a\": \"4\"}\n";
    let folder = Folder::with_entry("d.json", list, columns.clone());
    let list = folder.load().unwrap();
    let lines = Folder::with_entry("d.jsonl", lines, columns).load().unwrap();
    assert_eq!(list.train, lines.train);
    assert_eq!(list.row_text(RowId { dataset: 0, row: 0 }).unwrap().turns.len(), 2);
    let columns = json!({"columns": {"prompt": "q", "response": "a"}});
    let folder = Folder::with_entry("d.csv", "q,a\n\"One, \"\"two\"\"?\",yes\nmissing,\n", columns);
    let csv = folder.load().unwrap();
    assert_eq!((csv.train.len(), csv.dropped.len()), (1, 1));
    assert_eq!(csv.row_text(RowId { dataset: 0, row: 0 }).unwrap().turns[0].0, "One, \"two\"?");
}

#[test]
fn several_datasets_follow_one_another_each_cut_to_max_samples() {
    let folder = Folder::new(
        "d.json",
        &json!([{"instruction": "a", "input": "", "output": "1"}, {"instruction": "b", "input": "", "output": "2"}])
            .to_string(),
    )
    .yaml("dataset: d,e\nmax_samples: 1\n");
    folder.write(
        "data/e.json",
        &json!([{"instruction": "c", "input": "x", "output": "3"}, {"instruction": 5}]).to_string(),
    );
    folder.write("data/dataset_info.json", r#"{"d": {"file_name": "d.json"}, "e": {"file_name": "e.json"}}"#);
    let corpus = folder.load().unwrap();
    let rows: Vec<RowId> = corpus.train.iter().map(|example| example.row).collect();
    assert_eq!(rows, [RowId { dataset: 0, row: 0 }, RowId { dataset: 1, row: 0 }]);
    assert_eq!(corpus.row_text(rows[1]).unwrap().turns[0].0, "c\nx");
}
