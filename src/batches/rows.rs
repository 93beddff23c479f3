//! Reads the rows of json, jsonl and csv files one by one, as the `datasets` library would see them. What a
//! row means is in `align.rs`.

use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use serde::de::{DeserializeSeed, Deserializer, SeqAccess, Visitor};
use serde_json::{Map, Value};

use crate::{Error, Result};

/// One row: column → value. Absent columns are null.
pub type Row = Map<String, Value>;

/// What was seen while reading: the number of rows and every column that any row has.
#[derive(Debug, Default)]
pub struct Seen {
    pub rows: u32,
    pub columns: HashSet<String>,
}

/// Calls `take(index, row)` for each row of `file`, indices counting on from `seen.rows`. `take` returns
/// `false` to stop early.
///
/// # Errors
/// The file cannot be read or parsed (with line and column), its format is not covered, or `take` fails.
pub fn read(file: &Path, seen: &mut Seen, take: &mut dyn FnMut(u32, Row) -> Result<bool>) -> Result<()> {
    let extension = file.extension().and_then(|e| e.to_str()).unwrap_or_default();
    let mut opened = File::open(file).map_err(|error| Error::input(error.to_string()).at_path(file))?;
    parse(extension, &mut opened, seen, take)
        .map_err(|error| error.at_path(file).or_next("correct the row, or give the file that the run was trained on"))
}

/// [`read`] for text that is already open; `extension` says what it is.
///
/// # Errors
/// As [`read`].
pub fn parse(
    extension: &str,
    text: &mut dyn Read,
    seen: &mut Seen,
    take: &mut dyn FnMut(u32, Row) -> Result<bool>,
) -> Result<()> {
    let mut sink = Sink { seen, take, stopped: false };
    match extension {
        "json" | "jsonl" => read_json(text, &mut sink),
        "csv" => read_csv(text, &mut sink),
        "parquet" | "arrow" | "txt" => Err(Error::refused(format!("{extension} files are not read"))
            .next("convert it to .jsonl, keeping the order of the rows")),
        _ => Err(Error::input(format!("unknown file type `{extension}`"))
            .next("give `file_name` a .json, .jsonl or .csv file")),
    }
}

/// Where rows go, whatever the format.
struct Sink<'a> {
    seen: &'a mut Seen,
    take: &'a mut dyn FnMut(u32, Row) -> Result<bool>,
    stopped: bool,
}

impl Sink<'_> {
    fn row(&mut self, value: Value) -> Result<()> {
        if self.stopped {
            return Ok(());
        }
        let index = self.seen.rows;
        let Value::Object(row) = value else {
            return Err(Error::input(format!("expected an object, found {}", kind(&value))).at(format!("row {index}")));
        };
        self.seen.rows = index.checked_add(1).ok_or_else(|| Error::refused("more than 2³² rows"))?;
        for column in row.keys() {
            if !self.seen.columns.contains(column) {
                self.seen.columns.insert(column.clone());
            }
        }
        self.stopped = !(self.take)(index, row)?;
        Ok(())
    }
}

/// The JSON type of a value, for messages.
pub fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A list of objects, or objects one after the other (JSON lines), whatever the extension says.
fn read_json(file: &mut dyn Read, sink: &mut Sink<'_>) -> Result<()> {
    let mut text = BufReader::new(file);
    let mut first = [0u8; 1];
    loop {
        match text.read(&mut first).map_err(|error| Error::input(error.to_string()))? {
            0 => return Ok(()),
            _ if first[0].is_ascii_whitespace() => {}
            _ => break,
        }
    }
    let whole = first.as_slice().chain(text);
    let mut broken = None;
    let outcome = if first[0] == b'[' {
        let mut parser = serde_json::Deserializer::from_reader(whole);
        let list = List { sink, failed: &mut broken };
        list.deserialize(&mut parser).and_then(|()| parser.end())
    } else {
        read_lines(whole, sink, &mut broken)
    };
    match (broken, outcome) {
        (Some(error), _) => Err(error),
        (None, Err(error)) => Err(Error::input(format!("not valid JSON: {error}"))
            .next("the file is damaged or only partly copied; copy it again")),
        (None, Ok(())) => Ok(()),
    }
}

fn read_lines(text: impl Read, sink: &mut Sink<'_>, failed: &mut Option<Error>) -> serde_json::Result<()> {
    for value in serde_json::Deserializer::from_reader(text).into_iter::<Value>() {
        if let Err(error) = sink.row(value?) {
            *failed = Some(error);
            return Ok(());
        }
        if sink.stopped {
            return Ok(());
        }
    }
    Ok(())
}

/// Hands on the elements of a JSON list while it is parsed, so that the file never lies in memory whole.
struct List<'a, 'b> {
    sink: &'a mut Sink<'b>,
    failed: &'a mut Option<Error>,
}

impl<'de> DeserializeSeed<'de> for List<'_, '_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> std::result::Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for List<'_, '_> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of rows")
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<(), A::Error> {
        while let Some(value) = list.next_element::<Value>()? {
            if self.failed.is_none() {
                *self.failed = self.sink.row(value).err();
            }
        }
        Ok(())
    }
}

/// Strings that pandas reads as missing (pandas `STR_NA_VALUES`).
const CSV_MISSING: &[&str] = &[
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "NULL", "NaN", "None", "n/a", "nan", "null",
];

/// csv as `datasets` reads it through pandas: empty cells are null, and a column whose every cell is a number
/// holds numbers, not texts.
fn read_csv(file: &mut dyn Read, sink: &mut Sink<'_>) -> Result<()> {
    let mut reader = csv::ReaderBuilder::new().has_headers(true).from_reader(file);
    let malformed = |error: csv::Error| Error::input(format!("not valid CSV: {error}"));
    let columns = reader.headers().map_err(malformed)?.clone();
    let records = reader.records().collect::<csv::Result<Vec<_>>>().map_err(malformed)?;
    let numeric: Vec<bool> = (0..columns.len())
        .map(|column| {
            let mut cells =
                records.iter().filter_map(|r| r.get(column)).filter(|c| !CSV_MISSING.contains(c)).peekable();
            cells.peek().is_some() && cells.all(|cell| cell.trim().parse::<f64>().is_ok())
        })
        .collect();
    for record in &records {
        let cells = columns.iter().zip(record).zip(&numeric).map(|((column, cell), &numeric)| {
            let value = if CSV_MISSING.contains(&cell) {
                Value::Null
            } else if numeric {
                cell.trim().parse::<f64>().map_or(Value::Null, Value::from)
            } else {
                Value::from(cell)
            };
            (column.to_string(), value)
        });
        sink.row(Value::Object(cells.collect()))?;
        if sink.stopped {
            return Ok(());
        }
    }
    Ok(())
}
