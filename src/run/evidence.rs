//! What the files prove about the arithmetic of a run, where the configuration alone cannot tell (contract 4.2, 4.6,
//! 15.4).

use super::{Checkpoint, Run};
use crate::device::DType;
use crate::error::Kind;
use crate::model::PrecisionPlan;
use crate::{Error, Result};

/// A precision plan with its reasons.
#[derive(Debug, Clone, PartialEq)]
pub struct PrecisionEvidence {
    pub plan: PrecisionPlan,
    /// One sentence for each choice, in the order base, autocast, adapter.
    pub reasons: Vec<String>,
}

impl Run {
    /// In which dtypes the run computed, from its configuration, versions, base model and checkpoints.
    ///
    /// # Errors
    /// A base dtype that is not supported, or none that can be known.
    pub fn precision(&self) -> Result<PrecisionEvidence> {
        let config = &self.config;
        let mut reasons = Vec::new();
        let autocast = self.autocast(&mut reasons);
        let base = self.base_dtype(&mut reasons)?;
        let adapter = self.adapter_dtype(base, &mut reasons)?;
        let loss_scaling = autocast == Some(DType::F16);
        if config.upcast_layernorm {
            reasons.push("norm weights float32: upcast_layernorm is true".into());
        }
        let tf32 = config.tf32 && !config.use_cpu;
        Ok(PrecisionEvidence {
            plan: PrecisionPlan { base, autocast, adapter, tf32, loss_scaling, upcast_norm: config.upcast_layernorm },
            reasons,
        })
    }

    fn autocast(&self, reasons: &mut Vec<String>) -> Option<DType> {
        let config = &self.config;
        if config.bf16 {
            reasons.push("autocast bfloat16: bf16 is true".into());
            return Some(DType::BF16);
        }
        if !config.fp16 {
            let why = if config.pure_bf16 { "pure_bf16 computes in the base's dtype" } else { "neither bf16 nor fp16" };
            reasons.push(format!("no autocast: {why}"));
            return None;
        }
        let scaler = self.checkpoints.iter().find(|c| c.has_scaler);
        let (honoured, why) = match scaler {
            Some(checkpoint) => (true, format!("checkpoint-{} holds a scaler.pt", checkpoint.step)),
            None if config.use_cpu => {
                (false, "fp16 is true, but use_cpu is set and no checkpoint holds a scaler.pt".to_owned())
            }
            None if self.checkpoints.iter().any(|c| c.has_optimizer) => {
                (false, "fp16 is true, but the checkpoints with an optimizer.pt hold no scaler.pt".to_owned())
            }
            None => (true, "fp16 is true".to_owned()),
        };
        reasons.push(if honoured {
            format!("autocast float16 with loss scaling: {why}")
        } else {
            format!("no autocast: {why}; the trainer ignores fp16 on a CPU")
        });
        honoured.then_some(DType::F16)
    }

    fn base_dtype(&self, reasons: &mut Vec<String>) -> Result<DType> {
        let config = &self.config;
        let declared = self.base_dtype.as_deref().unwrap_or("float32");
        let of_model = parse_dtype(declared).ok_or_else(|| {
            Error::refused(format!("dtype `{declared}` is not supported"))
                .at("torch_dtype")
                .at_path(&self.path(&config.model_name_or_path).join("config.json"))
                .next("float32, bfloat16 and float16 bases are replayed")
        })?;
        if !self.semantics.base_in_compute_dtype {
            reasons.push(match &self.base_dtype {
                Some(_) => format!("base {}: the dtype that its config.json declares", name(of_model)),
                None => "base float32: its config.json declares no dtype".into(),
            });
            return Ok(of_model);
        }
        // LLaMA-Factory ≤ 0.9.3 loads the base in its compute dtype, whatever the files hold.
        let (dtype, why) = if config.bf16 || config.pure_bf16 {
            (DType::BF16, "bf16 or pure_bf16 is true")
        } else if config.fp16 {
            (DType::F16, "fp16 is true")
        } else if config.use_cpu {
            (DType::F32, "neither bf16 nor fp16, and use_cpu is set")
        } else if of_model == DType::BF16 {
            (DType::BF16, "neither bf16 nor fp16, the model declares bfloat16")
        } else {
            (DType::F16, "neither bf16 nor fp16; on a GPU anything but bfloat16 is then loaded as float16")
        };
        reasons
            .push(format!("base {}: {why} (LLaMA-Factory ≤ 0.9.3 loads the base in its compute dtype)", name(dtype)));
        Ok(dtype)
    }

    /// float32 masters always (contract 4.2), unless a checkpoint proves otherwise.
    fn adapter_dtype(&self, base: DType, reasons: &mut Vec<String>) -> Result<DType> {
        for checkpoint in self.checkpoints.iter().rev() {
            let stored = match stored_dtype(checkpoint) {
                // A trainer that is killed while it saves leaves half a checkpoint: an earlier one tells as well.
                Err(e) if e.kind == Kind::Input => {
                    reasons.push(format!("checkpoint-{} is damaged and tells nothing: {}", checkpoint.step, e.what));
                    continue;
                }
                stored => stored?,
            };
            reasons.push(format!("adapter {}: as stored in checkpoint-{}", name(stored), checkpoint.step));
            if stored.is_half() && stored != base {
                reasons.push(format!("note: the base is {}, the adapter {}", name(base), name(stored)));
            }
            return Ok(stored);
        }
        reasons.push("adapter float32: PEFT keeps trainable weights in float32".into());
        Ok(DType::F32)
    }

    /// Reasons of [`Run::precision`] and versions with their origins, one line each.
    pub fn evidence(&self) -> Vec<String> {
        let mut lines: Vec<String> = self
            .versions
            .list()
            .into_iter()
            .map(|(name, version, origin)| format!("{name} {version} ({origin})"))
            .collect();
        match self.precision() {
            Ok(precision) => lines.extend(precision.reasons),
            Err(e) => lines.push(e.to_string()),
        }
        lines
    }
}

fn stored_dtype(checkpoint: &Checkpoint) -> Result<DType> {
    match checkpoint.adapter()?.stored.as_str() {
        "F32" => Ok(DType::F32),
        "BF16" => Ok(DType::BF16),
        "F16" => Ok(DType::F16),
        other => Err(Error::refused(format!("an adapter of {other} dtypes is not replayed")).at_path(&checkpoint.dir)),
    }
}

fn parse_dtype(text: &str) -> Option<DType> {
    Some(match text.strip_prefix("torch.").unwrap_or(text) {
        "float32" | "float" => DType::F32,
        "bfloat16" => DType::BF16,
        "float16" | "half" => DType::F16,
        _ => return None,
    })
}

fn name(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "float32",
        DType::BF16 => "bfloat16",
        DType::F16 => "float16",
    }
}
