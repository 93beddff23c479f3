//! What of two runs' files is the same: base weights, adapters, data. Contents decide, names and times do not.

use std::io::Read;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::model::weight_files;
use crate::run::{Checkpoint, Run};

/// Files up to this size are hashed whole; of longer ones the ends and evenly spaced blocks, which tells models apart
/// but not a single changed weight.
const WHOLE: u64 = 4 << 30;
const BLOCKS: u64 = 256;
const BLOCK: usize = 1 << 20;

/// First twelve digits of a file's SHA-256, `(missing)`, or with `~` in front where it was only sampled.
pub fn file(path: &Path) -> String {
    hash(path).unwrap_or_else(|_| "(missing)".into())
}

fn hash(path: &Path) -> std::io::Result<String> {
    use std::io::{Seek, SeekFrom};
    let mut file = std::fs::File::open(path)?;
    let length = file.metadata()?.len();
    let mut digest = Sha256::new();
    digest.update(length.to_le_bytes());
    let mut block = vec![0; BLOCK];
    if length <= WHOLE {
        loop {
            match file.read(&mut block)? {
                0 => break,
                read => digest.update(&block[..read]),
            }
        }
    } else {
        for i in 0..BLOCKS {
            file.seek(SeekFrom::Start((length - BLOCK as u64) / (BLOCKS - 1) * i))?;
            file.read_exact(&mut block)?;
            digest.update(&block);
        }
    }
    let short: String = digest.finalize().iter().take(6).map(|b| format!("{b:02x}")).collect();
    Ok(if length > WHOLE { format!("~{short}") } else { short })
}

/// The weights of the base model, all files in one.
pub fn base_weights(run: &Run) -> String {
    let folder = run.path(&run.config.model_name_or_path);
    match weight_files(&folder) {
        Ok(files) => files.iter().map(|path| file(path)).collect::<Vec<_>>().join(" "),
        Err(_) => "(missing)".into(),
    }
}

/// config.json of the base model.
pub fn base_config(run: &Run) -> String {
    file(&run.path(&run.config.model_name_or_path).join("config.json"))
}

/// The adapter that training continues from; `none`: a fresh one.
pub fn first_adapter(run: &Run) -> String {
    let folder = run.config.adapter_name_or_path.as_ref();
    folder.map_or("none".into(), |folder| file(&run.path(folder).join("adapter_model.safetensors")))
}

/// The first checkpoint that both runs have and whose adapters differ: step, and both hashes. `None`: no difference.
pub fn first_other_adapter(run: &Run, baseline: &Run) -> Option<(u64, String, String)> {
    let of = |c: &Checkpoint| file(&c.dir.join("adapter_model.safetensors"));
    run.checkpoints.iter().find_map(|c| {
        let other = baseline.checkpoints.iter().find(|other| other.step == c.step)?;
        let (a, b) = (of(c), of(other));
        (a != b).then_some((c.step, a, b))
    })
}

/// Every data set's files.
pub fn data(run: &Run) -> String {
    let dir = run.path(&run.config.dataset_dir);
    let info: Option<serde_json::Value> =
        std::fs::read_to_string(dir.join("dataset_info.json")).ok().and_then(|t| crate::run::json::parse(&t).ok());
    let of = |name: &String| {
        let path = info.as_ref()?.get(name)?.get("file_name")?.as_str()?.to_owned();
        Some(format!("{name} {}", file(&dir.join(path))))
    };
    let parts: Vec<String> =
        run.config.dataset.iter().map(|name| of(name).unwrap_or_else(|| format!("{name} ?"))).collect();
    parts.join(", ")
}
