//! [`Corpus::load`]: datasets → aligned rows → split → tokenized examples, in the order of each LLaMA-Factory
//! version (contract 2.3). The order in which the trainer visits them is in `plan.rs`.

use std::path::Path;

use rayon::prelude::*;

use super::align::{Aligned, Conversation, align, check_columns};
use super::encode::Encoding;
use super::pack::Packer;
use super::random::Mt19937;
use super::rows::{self, Seen};
use super::source::{Catalogue, Source};
use super::split::split;
use super::template::{V0_9_3, template};
use super::tokenizer::Tokenizer;
use super::{Corpus, Dataset, Example, RowId};
use crate::run::{Run, TrainConfig, Version};
use crate::{Error, Result};

/// A row on its way to the tokenizer.
type AlignedRow = (RowId, Aligned);

impl Corpus {
    /// Reads and tokenizes every row of a run.
    ///
    /// # Errors
    /// Missing or malformed files, columns or tokenizer (named, with row numbers); no usable row; a token id that
    /// the base model's embedding lacks; anything whose tokens are not covered.
    pub fn load(run: &Run, config: &TrainConfig) -> Result<Corpus> {
        let version = llamafactory_version(run);
        let packer = Packer::new(config, version >= V0_9_3)?;
        let mut encoding = encoding(config, version)?;
        if let Some(packer) = &packer {
            encoding.cutoff_len = packer.capacity;
        }
        let model_dir = run.root.join(&config.model_name_or_path);
        let tokenizer = Tokenizer::load(&model_dir, &encoding.template)?;
        let mut loader = Loader::new(&run.root.join(&config.dataset_dir), config)?;
        let mut corpus = Corpus {
            datasets: Vec::new(),
            train: Vec::new(),
            packs: Vec::new(),
            eval: Vec::new(),
            dropped: Vec::new(),
            vocab_size: vocab_size(&model_dir)?,
            pad_token_id: tokenizer.pad,
            sources: Vec::new(),
        };
        let mut rows = Vec::new();
        for name in unique(&config.dataset) {
            rows.extend(loader.rows(name)?);
        }
        let mut eval_sets = eval_sets(&mut loader, config, version)?;
        // 0.9.2 tokenizes and then splits, so that dropped rows do not count (contract 2.3).
        if !run.semantics.splits_before_tokenizing && packer.is_none() {
            corpus.drop_unusable(&mut rows);
        }
        if packer.is_some() && config.val_size > 0.0 && !run.semantics.splits_before_tokenizing {
            return Err(Error::refused("LLaMA-Factory before 0.9.3 splits off packed rows, which is not covered")
                .at("val_size")
                .next("replay without it only if the run used 0.9.3 or later: --versions llamafactory=0.9.4"));
        }
        if let Some((train, test)) = split(count(&rows)?, config.val_size, config.seed)? {
            let mut rows: Vec<Option<AlignedRow>> = std::mem::take(&mut rows).into_iter().map(Some).collect();
            let mut pick = |order: Vec<u32>| order.iter().filter_map(|&i| rows[i as usize].take()).collect::<Vec<_>>();
            eval_sets.push((String::new(), pick(test)));
            return corpus.tokenized(pick(train), eval_sets, &encoding, &tokenizer, packer, loader);
        }
        corpus.tokenized(rows, eval_sets, &encoding, &tokenizer, packer, loader)
    }

    fn tokenized(
        mut self,
        mut train: Vec<AlignedRow>,
        eval: Vec<(String, Vec<AlignedRow>)>,
        encoding: &Encoding,
        tokenizer: &Tokenizer,
        packer: Option<Packer>,
        loader: Loader<'_>,
    ) -> Result<Corpus> {
        self.sources = loader.sources;
        self.datasets = self.sources.iter().map(|s| Dataset { name: s.name.clone(), files: s.files.clone() }).collect();
        let calls = packer.map(|packer| {
            let calls = packer.calls(train.len());
            calls.into_iter().zip(&train).filter(|(_, (_, row))| row.is_ok()).map(|(call, _)| call).collect::<Vec<_>>()
        });
        self.drop_unusable(&mut train);
        if train.is_empty() {
            return Err(Error::input("no usable training row")
                .at(format!("dataset {}", self.datasets.iter().map(|d| d.name.as_str()).collect::<Vec<_>>().join(", ")))
                .next(match self.dropped.first() {
                    Some((row, reason)) => format!("all rows were dropped; row {}: {reason}", row.row),
                    None => "the files hold no rows".into(),
                }));
        }
        self.train = self.encode(&train, encoding, tokenizer)?;
        if let (Some(packer), Some(calls)) = (packer, calls) {
            self.pack(&packer, &calls);
        }
        for (name, mut rows) in eval {
            self.drop_unusable(&mut rows);
            let examples = self.encode(&rows, encoding, tokenizer)?;
            self.eval.push((name, examples));
        }
        Ok(self)
    }

    fn pack(&mut self, packer: &Packer, calls: &[usize]) {
        let fits = |example: &Example| example.input_ids.len() <= packer.capacity;
        let all = std::mem::take(&mut self.train);
        let (kept, long): (Vec<_>, Vec<_>) = all.into_iter().zip(calls.iter().copied()).partition(|(e, _)| fits(e));
        let reason = |e: &Example| format!("{} tokens do not fit a packed row", e.input_ids.len());
        self.dropped.extend(long.iter().map(|(example, _)| (example.row, reason(example))));
        let (examples, calls): (Vec<_>, Vec<_>) = kept.into_iter().unzip();
        (self.train, self.packs) = packer.pack(examples, &calls);
    }

    fn drop_unusable(&mut self, rows: &mut Vec<AlignedRow>) {
        rows.retain(|(id, aligned)| match aligned {
            Ok(_) => true,
            Err(reason) => {
                self.dropped.push((*id, reason.clone()));
                false
            }
        });
    }

    fn encode(&self, rows: &[AlignedRow], encoding: &Encoding, tokenizer: &Tokenizer) -> Result<Vec<Example>> {
        rows.par_iter()
            .filter_map(|(id, aligned)| aligned.as_ref().ok().map(|conversation| (*id, conversation)))
            .map(|(id, conversation)| {
                let example =
                    encoding.example(id, conversation, tokenizer).map_err(|error| error.at(self.place(id)))?;
                self.check_range(&example)?;
                Ok(example)
            })
            .collect()
    }

    fn check_range(&self, example: &Example) -> Result<()> {
        match example.input_ids.iter().find(|&&id| id as usize >= self.vocab_size) {
            None => Ok(()),
            Some(id) => Err(Error::input(format!(
                "token id {id} is outside the base model's vocabulary of {}",
                self.vocab_size
            ))
            .at(self.place(example.row))
            .next("the template's special tokens may be missing from this tokenizer (resize_vocab is not covered)")),
        }
    }

    /// `dataset row N`, for messages.
    pub fn place(&self, row: RowId) -> String {
        let name = self.datasets.get(usize::from(row.dataset)).map_or("?", |dataset| dataset.name.as_str());
        format!("dataset `{name}` row {}", row.row)
    }

    /// The texts of one row, read again from its file.
    ///
    /// # Errors
    /// The file is gone or changed so that the row does not exist any more, or the row was dropped.
    pub fn row_text(&self, row: RowId) -> Result<Conversation> {
        let source = self
            .sources
            .get(usize::from(row.dataset))
            .ok_or_else(|| Error::internal(format!("no dataset {}", row.dataset)))?;
        let mut found = None;
        let mut seen = Seen::default();
        for file in &source.files {
            rows::read(file, &mut seen, &mut |index, values| {
                if index == row.row {
                    found = Some(align(&values, &source.columns)?);
                }
                Ok(index < row.row)
            })?;
        }
        match found {
            Some(Ok(conversation)) => Ok(conversation),
            Some(Err(reason)) => Err(Error::input(reason).at(self.place(row))),
            None => Err(Error::input("the file has no such row any more").at(self.place(row))),
        }
    }
}

/// LLaMA-Factory's version: known, or the side of 0.9.3 that the evidence points to.
pub(crate) fn llamafactory_version(run: &Run) -> Version {
    match &run.versions.llamafactory {
        Some((version, _)) => *version,
        None if run.semantics.splits_before_tokenizing => Version(0, 9, 5),
        None => Version(0, 9, 2),
    }
}

fn encoding(config: &TrainConfig, version: Version) -> Result<Encoding> {
    let mut template = template(&config.template, version)?;
    if config.train_on_prompt && template.efficient_eos {
        return Err(Error::input(format!("template `{}` does not support it", template.name)).at("train_on_prompt"));
    }
    if let Some(system) = &config.default_system {
        template.default_system.clone_from(system);
    }
    let written = |key: &str| config.written.get(key).and_then(serde_json::Value::as_bool);
    Ok(Encoding {
        cutoff_len: config.cutoff_len,
        train_on_prompt: config.train_on_prompt,
        mask_history: config.mask_history,
        enable_thinking: config.enable_thinking,
        preserve_thinking: written("preserve_thinking").unwrap_or(false),
        ..Encoding::of_version(template, version)
    })
}

/// Names in order, each once: LLaMA-Factory keeps the datasets in a dictionary.
fn unique(names: &[String]) -> Vec<&str> {
    let mut seen = Vec::new();
    for name in names {
        if !seen.contains(&name.as_str()) {
            seen.push(name.as_str());
        }
    }
    seen
}

fn eval_sets(
    loader: &mut Loader<'_>,
    config: &TrainConfig,
    version: Version,
) -> Result<Vec<(String, Vec<AlignedRow>)>> {
    if config.eval_dataset.is_empty() {
        return Ok(Vec::new());
    }
    if config.val_size > 1e-6 {
        return Err(
            Error::input("val_size and eval_dataset exclude each other; the trainer stops on it").at("eval_dataset")
        );
    }
    let asked = config.written.get("eval_on_each_dataset").and_then(serde_json::Value::as_bool);
    let apart = if version < V0_9_3 { !config.do_predict } else { asked.unwrap_or(false) };
    let mut sets: Vec<(String, Vec<AlignedRow>)> = Vec::new();
    for name in unique(&config.eval_dataset) {
        let rows = loader.rows(name)?;
        match sets.last_mut() {
            Some((_, merged)) if !apart => merged.extend(rows),
            _ => sets.push((if apart { name.to_string() } else { String::new() }, rows)),
        }
    }
    Ok(sets)
}

fn count(rows: &[AlignedRow]) -> Result<u32> {
    u32::try_from(rows.len()).map_err(|_| Error::refused("more than 2³² rows"))
}

/// Rows of the base model's embedding, from its config.json.
fn vocab_size(model_dir: &Path) -> Result<usize> {
    let path = model_dir.join("config.json");
    let text = std::fs::read_to_string(&path).map_err(|error| Error::input(error.to_string()).at_path(&path))?;
    let config: serde_json::Value =
        serde_json::from_str(&text).map_err(|error| Error::input(format!("not valid JSON: {error}")).at_path(&path))?;
    config
        .get("vocab_size")
        .and_then(serde_json::Value::as_u64)
        .and_then(|size| usize::try_from(size).ok())
        .ok_or_else(|| Error::input("`vocab_size` is missing").at_path(&path))
}

/// Reads datasets in LLaMA-Factory's order; holds numpy's global stream, which num_samples draws from.
struct Loader<'a> {
    catalogue: Catalogue,
    config: &'a TrainConfig,
    sources: Vec<Source>,
    numpy: Mt19937,
}

impl<'a> Loader<'a> {
    fn new(dataset_dir: &Path, config: &'a TrainConfig) -> Result<Self> {
        if config.dataset.is_empty() {
            return Err(Error::input("no dataset is named").at("dataset"));
        }
        let catalogue = Catalogue::open(dataset_dir)?;
        Ok(Self { catalogue, config, sources: Vec::new(), numpy: Mt19937::new(config.seed) })
    }

    /// The aligned rows of one dataset, after num_samples and max_samples.
    fn rows(&mut self, name: &str) -> Result<Vec<AlignedRow>> {
        let source = self.catalogue.source(name)?;
        let known = self.sources.iter().position(|known| known.name == name);
        let dataset = u16::try_from(known.unwrap_or(self.sources.len()))
            .map_err(|_| Error::refused("more than 65536 datasets"))?;
        let limit = self.config.max_samples.unwrap_or(usize::MAX);
        let mut seen = Seen::default();
        let mut rows: Vec<AlignedRow> = Vec::new();
        for file in &source.files {
            rows::read(file, &mut seen, &mut |index, values| {
                if source.num_samples.is_some() || (index as usize) < limit {
                    let aligned = align(&values, &source.columns).map_err(|error| error.at(format!("row {index}")))?;
                    rows.push((RowId { dataset, row: index }, aligned));
                }
                Ok(true)
            })
            .map_err(|error| error.at(format!("dataset `{name}`")))?;
        }
        if seen.rows > 0 {
            check_columns(&source.columns, &seen).map_err(|error| error.at(format!("dataset `{name}`")))?;
        }
        if let Some(wanted) = source.num_samples {
            rows = self.sampled(rows, wanted)?;
            rows.truncate(limit);
        }
        if known.is_none() {
            self.sources.push(source);
        }
        Ok(rows)
    }

    /// `num_samples`: a permutation's first rows, then draws with replacement for the excess.
    fn sampled(&mut self, rows: Vec<AlignedRow>, wanted: usize) -> Result<Vec<AlignedRow>> {
        let n = count(&rows)?;
        if n == 0 {
            return Ok(rows);
        }
        let mut order = self.numpy.numpy_permutation(n);
        order.truncate(wanted);
        order.extend(self.numpy.numpy_choice(n, wanted - order.len()));
        Ok(order.iter().map(|&i| rows[i as usize].clone()).collect())
    }
}
