//! What the tokenized rows show: answers cut away, rows without labels, duplicates, contradictions, outliers.

use std::collections::hash_map::DefaultHasher;
use std::collections::{HashMap, HashSet};
use std::hash::{Hash, Hasher};

use super::{Code, Finding, Severity};
use crate::batches::{Dataset, Example, IGNORE, RowId};
use crate::run::Run;

/// Findings about the training rows: a corpus's data sets, training examples and dropped rows.
pub fn findings(run: &Run, datasets: &[Dataset], train: &[Example], dropped: &[(RowId, String)]) -> Vec<Finding> {
    let data = Data { datasets, train };
    let mut found = Vec::new();
    found.extend(cut(run, &data));
    found.extend(masked(run, &data));
    found.extend(dropped.first().map(|(row, reason)| {
        let text = format!("{} row(s) are dropped by the trainer ({reason})", dropped.len());
        Finding::new(Code::DroppedRows, Severity::Note, data.name(*row), text)
    }));
    found.extend(repeated(&data));
    found.extend(lengths(&data));
    found
}

struct Data<'a> {
    datasets: &'a [Dataset],
    train: &'a [Example],
}

impl Data<'_> {
    /// `name:row`, as `--neutralise-rows` takes it.
    fn name(&self, row: RowId) -> String {
        let dataset = self.datasets.get(usize::from(row.dataset)).map_or("?", |d| d.name.as_str());
        format!("{dataset}:{}", row.row)
    }
}

fn rows(data: &Data<'_>, examples: &[&Example]) -> String {
    let mut shown: Vec<String> = examples.iter().take(5).map(|e| data.name(e.row)).collect();
    if examples.len() > shown.len() {
        shown.push("…".into());
    }
    shown.join(", ")
}

fn cut(run: &Run, data: &Data<'_>) -> Option<Finding> {
    let cut: Vec<&Example> = data.train.iter().filter(|e| e.input_ids.len() >= run.config.cutoff_len).collect();
    (!cut.is_empty()).then(|| {
        Finding::new(
            Code::AnswersCut,
            Severity::Warning,
            run.place("cutoff_len"),
            format!(
                "{} of {} rows reach cutoff_len {} and are cut there ({}): the answer's end and its end-of-text token go \
                 first, so the model learns not to stop; raise cutoff_len",
                cut.len(),
                data.train.len(),
                run.config.cutoff_len,
                rows(data, &cut)
            ),
        )
    })
}

fn masked(run: &Run, data: &Data<'_>) -> Option<Finding> {
    let masked: Vec<&Example> = data.train.iter().filter(|e| e.label_tokens() == 0).collect();
    let one_row_windows = run.config.per_device_train_batch_size * run.config.gradient_accumulation_steps == 1;
    (!masked.is_empty()).then(|| {
        Finding::new(
            Code::MaskedRows,
            Severity::Warning,
            run.place("dataset"),
            format!(
                "{} of {} rows have no label at all ({}): {}; remove them or raise cutoff_len",
                masked.len(),
                data.train.len(),
                rows(data, &masked),
                if one_row_windows {
                    "each of them is a whole step with loss 0.0"
                } else {
                    "a window made of them alone logs loss 0.0, and a mean over such a micro-batch is NaN"
                }
            ),
        )
    })
}

fn hash(tokens: &[u32]) -> u64 {
    let mut hasher = DefaultHasher::new();
    tokens.hash(&mut hasher);
    hasher.finish()
}

/// Rows with the same prompt: the same answer (duplicates) or another one (contradictions).
fn repeated(data: &Data<'_>) -> Vec<Finding> {
    let mut prompts: HashMap<u64, Vec<&Example>> = HashMap::new();
    for example in data.train {
        let prompt = example.labels.iter().position(|&l| l != IGNORE).unwrap_or(example.labels.len());
        prompts.entry(hash(&example.input_ids[..prompt])).or_default().push(example);
    }
    let (mut duplicates, mut conflicting) = (Vec::new(), Vec::new());
    for group in prompts.values().filter(|g| g.len() > 1) {
        let mut answers = HashSet::new();
        duplicates.extend(group.iter().filter(|e| !answers.insert(hash(&e.input_ids))));
        if answers.len() > 1 {
            conflicting.extend(group);
        }
    }
    let mut found = Vec::new();
    let mut add = |code, mut list: Vec<&Example>, text: &str| {
        list.sort_by_key(|e| e.row);
        if let Some(first) = list.first() {
            let place = data.name(first.row);
            let text = format!("{} of {} rows {text} ({})", list.len(), data.train.len(), rows(data, &list));
            found.push(Finding::new(code, Severity::Note, place, text));
        }
    };
    add(Code::DuplicateRows, duplicates, "repeat an earlier row: they are memorised first and count twice");
    add(
        Code::ConflictingRows,
        conflicting,
        "share a prompt but not the answer: their loss cannot fall, and once the others are learnt they drive the gradient",
    );
    found
}

/// Rows more than 10 times the median: their micro-batch outweighs or outlasts the others.
fn lengths(data: &Data<'_>) -> Option<Finding> {
    const TIMES: usize = 10;
    let mut sorted: Vec<usize> = data.train.iter().map(|e| e.input_ids.len()).collect();
    sorted.sort_unstable();
    let median = *sorted.get(sorted.len() / 2)?;
    let long: Vec<&Example> = data.train.iter().filter(|e| e.input_ids.len() > TIMES * median.max(1)).collect();
    let first = long.first()?;
    Some(Finding::new(
        Code::ExtremeLengths,
        Severity::Note,
        data.name(first.row),
        format!(
            "{} row(s) are more than {TIMES} times as long as the median of {median} tokens ({}), the longest {}",
            long.len(),
            rows(data, &long),
            sorted.last().copied().unwrap_or(0)
        ),
    ))
}
