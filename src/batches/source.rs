//! dataset_info.json: where a dataset lies, and which columns and tags hold what (contract 2.1). Reads no rows
//! (`rows.rs`) and judges none (`align.rs`).

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::{Error, Result};

/// How a dataset's rows are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Formatting {
    /// prompt / query / response columns.
    #[default]
    Alpaca,
    /// A column with a list of messages.
    ShareGpt,
}

/// Column and tag names of one dataset; `None`: the dataset has no such column.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Columns {
    pub formatting: Formatting,
    pub prompt: Option<String>,
    pub query: Option<String>,
    pub response: Option<String>,
    pub history: Option<String>,
    pub messages: Option<String>,
    pub system: Option<String>,
    /// Columns whose contents change the tokens in ways that are not covered, if not empty.
    pub unsupported: Vec<String>,
    pub role_tag: Option<String>,
    pub content_tag: Option<String>,
    pub user_tag: Option<String>,
    pub assistant_tag: Option<String>,
    pub observation_tag: Option<String>,
    pub function_tag: Option<String>,
    pub system_tag: Option<String>,
}

impl Default for Columns {
    /// DatasetAttr's defaults (llamafactory/data/parser.py).
    fn default() -> Self {
        let named = |name: &str| Some(name.to_string());
        Self {
            formatting: Formatting::Alpaca,
            prompt: named("instruction"),
            query: named("input"),
            response: named("output"),
            history: None,
            messages: named("conversations"),
            system: None,
            unsupported: Vec::new(),
            role_tag: named("from"),
            content_tag: named("value"),
            user_tag: named("human"),
            assistant_tag: named("gpt"),
            observation_tag: named("observation"),
            function_tag: named("function_call"),
            system_tag: named("system"),
        }
    }
}

/// One entry of dataset_info.json, resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    pub name: String,
    /// In reading order; at least one.
    pub files: Vec<PathBuf>,
    pub columns: Columns,
    /// Rows drawn from numpy's global stream before anything else.
    pub num_samples: Option<usize>,
}

/// dataset_info.json of a folder, parsed once for all datasets of a run.
pub struct Catalogue {
    path: PathBuf,
    dir: PathBuf,
    entries: Map<String, Value>,
}

impl Catalogue {
    /// # Errors
    /// The file is missing or is not a JSON object.
    pub fn open(dataset_dir: &Path) -> Result<Self> {
        let path = dataset_dir.join("dataset_info.json");
        let text = std::fs::read_to_string(&path).map_err(|error| {
            Error::input(format!("cannot read the dataset list: {error}"))
                .at_path(&path)
                .next("check `dataset_dir`; relative paths resolve against --root")
        })?;
        let value: Value = serde_json::from_str(&text)
            .map_err(|error| Error::input(format!("not valid JSON: {error}")).at_path(&path).next("copy it again"))?;
        match value {
            Value::Object(entries) => Ok(Self { dir: dataset_dir.to_path_buf(), path, entries }),
            _ => Err(Error::input("not a JSON object of datasets")
                .at_path(&path)
                .next("it maps each dataset's name to an object with its file_name")),
        }
    }

    /// # Errors
    /// The dataset is undefined, remote, of a refused kind, or its file is missing.
    pub fn source(&self, name: &str) -> Result<Source> {
        let place = |error: Error| {
            error.at(format!("dataset `{name}`")).at_path(&self.path).or_next("correct this entry of dataset_info.json")
        };
        let Some(entry) = self.entries.get(name) else {
            let known: Vec<&str> = self.entries.keys().map(String::as_str).take(20).collect();
            let hint = format!("defined here: {}", known.join(", "));
            return Err(place(Error::input("not defined in dataset_info.json").next(hint)));
        };
        let entry = entry.as_object().ok_or_else(|| place(Error::input("its entry is not a JSON object")))?;
        refuse_uncovered(entry).map_err(place)?;
        let columns = columns(entry).map_err(place)?;
        let num_samples = match entry.get("num_samples") {
            None | Some(Value::Null) => None,
            // More rows than their numbers can count would only fill the memory.
            Some(value) => Some(value.as_u64().and_then(|n| u32::try_from(n).ok()).ok_or_else(|| {
                place(Error::input(format!("num_samples must be a whole number below 2³², found {value}")))
            })? as usize),
        };
        let files = self.files(entry).map_err(place)?;
        Ok(Source { name: name.to_string(), files, columns, num_samples })
    }

    fn files(&self, entry: &Map<String, Value>) -> Result<Vec<PathBuf>> {
        let file_name = match entry.get("file_name") {
            Some(Value::String(name)) => name,
            _ => return Err(Error::input("`file_name` is missing")),
        };
        let path = self.dir.join(file_name);
        if !path.is_dir() {
            if path.is_file() {
                return Ok(vec![path]);
            }
            return Err(Error::input(format!("its file {} does not exist", path.display()))
                .next("put the file there, or correct file_name or dataset_dir"));
        }
        let listing = std::fs::read_dir(&path).map_err(|error| Error::input(error.to_string()).at_path(&path))?;
        let mut files = Vec::new();
        for item in listing {
            files.push(item.map_err(|error| Error::input(error.to_string()).at_path(&path))?.path());
        }
        match files.len() {
            0 => Err(Error::input("the folder holds no file").at_path(&path)),
            1 => Ok(files),
            // LLaMA-Factory reads them in the order of os.listdir, which nothing on disk records.
            n => Err(Error::refused(format!("the folder holds {n} files, read in an order that is not recorded"))
                .at_path(&path)
                .next("name the files one by one in dataset_info.json, in the order of the training machine")),
        }
    }
}

/// Entries whose rows come from elsewhere or mean something else than supervised conversations.
fn refuse_uncovered(entry: &Map<String, Value>) -> Result<()> {
    for key in ["hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name"] {
        if entry.get(key).is_some_and(|value| !value.is_null()) {
            return Err(Error::refused(format!("`{key}`: the rows are not on this disk"))
                .next("download the rows as .json or .jsonl and give `file_name` instead"));
        }
    }
    if entry.get("ranking").and_then(Value::as_bool) == Some(true) {
        return Err(Error::refused("`ranking: true` is preference data, not supervised fine-tuning"));
    }
    match entry.get("split") {
        None | Some(Value::Null) => Ok(()),
        Some(Value::String(split)) if split == "train" => Ok(()),
        Some(split) => Err(Error::refused(format!("`split: {split}` is not covered")).next("cut the file instead")),
    }
}

fn columns(entry: &Map<String, Value>) -> Result<Columns> {
    let mut columns = Columns {
        formatting: match entry.get("formatting") {
            None | Some(Value::Null) => Formatting::Alpaca,
            Some(Value::String(name)) if name == "alpaca" => Formatting::Alpaca,
            Some(Value::String(name)) if name == "sharegpt" => Formatting::ShareGpt,
            Some(other) => {
                return Err(Error::refused(format!("`formatting: {other}` is not covered"))
                    .next("convert the rows to alpaca or sharegpt"));
            }
        },
        ..Columns::default()
    };
    // With a `columns` (or `tags`) object, what it does not name is absent, whatever the defaults are.
    if let Some(names) = entry.get("columns") {
        let names = names.as_object().ok_or_else(|| Error::input("`columns` is not a JSON object"))?;
        let get = |key: &str| text_of(names, key, "columns");
        columns.prompt = get("prompt")?;
        columns.query = get("query")?;
        columns.response = get("response")?;
        columns.history = get("history")?;
        columns.messages = get("messages")?;
        columns.system = get("system")?;
        for key in ["tools", "images", "videos", "audios", "kto_tag"] {
            columns.unsupported.extend(get(key)?);
        }
    }
    if let Some(names) = entry.get("tags") {
        let names = names.as_object().ok_or_else(|| Error::input("`tags` is not a JSON object"))?;
        let get = |key: &str| text_of(names, key, "tags");
        columns.role_tag = get("role_tag")?;
        columns.content_tag = get("content_tag")?;
        columns.user_tag = get("user_tag")?;
        columns.assistant_tag = get("assistant_tag")?;
        columns.observation_tag = get("observation_tag")?;
        columns.function_tag = get("function_tag")?;
        columns.system_tag = get("system_tag")?;
    }
    Ok(columns)
}

fn text_of(names: &Map<String, Value>, key: &str, object: &str) -> Result<Option<String>> {
    match names.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(name)) => Ok(Some(name.clone())),
        Some(other) => Err(Error::input(format!("`{object}.{key}` must be a name, found {other}"))),
    }
}
