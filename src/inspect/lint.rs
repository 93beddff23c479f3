//! Config lint: settings that are known to bite, each with its reason. Rules of thumb are called so; the replay knows.

use super::{Code, Finding, Severity};
use crate::run::{ResumeOrder, Run, WindowRule};

/// The advice that such reports usually get: 2e-5 … 1e-4, accumulation at most 4, more warmup.
const USUAL_LEARNING_RATE: f64 = 1e-4;
const USUAL_ACCUMULATION: usize = 4;
/// LoRA multiplies its branch by alpha / rank; 2 is LLaMA-Factory's default.
const USUAL_SCALE: f64 = 4.0;

pub fn findings(run: &Run) -> Vec<Finding> {
    let mut found = edited(run);
    found.extend(learning_rate(run));
    found.extend(warmup(run));
    found.extend(accumulation(run));
    found.extend(clipping(run));
    found.extend(precision(run));
    found.extend(logging(run));
    found.extend(checkpoints(run));
    found.extend(versions(run));
    found
}

fn edited(run: &Run) -> Vec<Finding> {
    let of = |(key, written, recorded): &(String, serde_json::Value, serde_json::Value)| {
        Finding::new(
            Code::ConfigEdited,
            Severity::Warning,
            run.place(key),
            format!(
                "{key} is {written} here, but training_args.bin of the run says {recorded}, which is used: the file was edited after the run"
            ),
        )
    };
    run.config.disagreements.iter().map(of).collect()
}

fn learning_rate(run: &Run) -> Option<Finding> {
    let c = &run.config;
    let rank = c.lora_rank as f64;
    let scale = c.lora_alpha / if c.use_rslora { rank.sqrt() } else { rank };
    if c.learning_rate <= USUAL_LEARNING_RATE && scale <= USUAL_SCALE {
        return None;
    }
    // A step of Adam moves B by up to lr, and the layer by scale times that.
    let severity = if c.learning_rate * scale > 10.0 * USUAL_LEARNING_RATE * USUAL_SCALE {
        Severity::Warning
    } else {
        Severity::Note
    };
    Some(Finding::new(
        Code::HighLearningRate,
        severity,
        run.place("learning_rate"),
        format!(
            "learning_rate {:e} × LoRA scale {scale} ({}); the rule of thumb is 2e-5 … 1e-4 at a scale of 2. A rule of \
             thumb does not know this run: `spikeprobe replay {} --set learning_rate={:e}` does",
            c.learning_rate,
            if c.use_rslora { "alpha / √rank" } else { "alpha / rank" },
            run.config_path.display(),
            USUAL_LEARNING_RATE
        ),
    ))
}

fn warmup(run: &Run) -> Option<Finding> {
    let c = &run.config;
    let none = c.warmup_steps == 0.0 && c.warmup_ratio.is_none_or(|r| r == 0.0) || c.lr_scheduler_type == "constant";
    (none && c.learning_rate > USUAL_LEARNING_RATE).then(|| {
        Finding::new(
            Code::NoWarmup,
            Severity::Note,
            run.place("lr_scheduler_type"),
            format!(
                "no warmup: Adam's first updates are ±{:e} on every element, whatever the gradient; warmup_ratio: 0.1 is \
                 the usual remedy (the scheduler `constant` ignores it, `constant_with_warmup` does not)",
                c.learning_rate
            ),
        )
    })
}

fn accumulation(run: &Run) -> Option<Finding> {
    let c = &run.config;
    (c.gradient_accumulation_steps > USUAL_ACCUMULATION).then(|| {
        Finding::new(
            Code::LongAccumulation,
            Severity::Note,
            run.place("gradient_accumulation_steps"),
            format!(
                "gradient_accumulation_steps {} (usual advice: at most {USUAL_ACCUMULATION}). Accumulation as such does \
                 not destabilise, it averages; it makes fewer, larger steps out of the same data: `spikeprobe sweep {} \
                 --accumulation 1,4,8` compares them",
                c.gradient_accumulation_steps,
                run.config_path.display()
            ),
        )
    })
}

fn clipping(run: &Run) -> Option<Finding> {
    let c = &run.config;
    if c.max_grad_norm > 0.0 {
        return None;
    }
    let half = if c.fp16 { "; with fp16 an overflow that slips through is not bounded either" } else { "" };
    Some(Finding::new(
        Code::NoClipping,
        Severity::Warning,
        run.place("max_grad_norm"),
        format!(
            "max_grad_norm {}: gradients are not clipped, one bad batch moves the weights without bound{half}",
            c.max_grad_norm
        ),
    ))
}

fn precision(run: &Run) -> Vec<Finding> {
    let Ok(evidence) = run.precision() else { return Vec::new() };
    let mut found = Vec::new();
    if run.config.fp16 && evidence.plan.autocast.is_none() {
        found.push(Finding::new(
            Code::Fp16Ignored,
            Severity::Warning,
            run.place("fp16"),
            format!("fp16 had no effect: {}", evidence.reasons.first().map_or("", String::as_str)),
        ));
    }
    if evidence.plan.adapter.is_half() {
        // bf16 keeps 8 significant bits: an addend below 2⁻⁹ of the weight is rounded away.
        found.push(Finding::new(
            Code::HalfAdapter,
            Severity::Warning,
            run.place("pure_bf16"),
            format!(
                "the LoRA weights themselves are bfloat16: an update of learning_rate {:e} is lost on every weight \
                 larger than {:.1e}; keep float32 masters (bf16: true instead of pure_bf16: true)",
                run.config.learning_rate,
                run.config.learning_rate * 512.0
            ),
        ));
    }
    found
}

fn logging(run: &Run) -> Option<Finding> {
    let window = run.log.rows.iter().map(|r| r.window).max().unwrap_or(run.config.logging_steps as u64);
    (window > 1).then(|| {
        Finding::new(
            Code::CoarseLogging,
            Severity::Note,
            run.place("logging_steps"),
            format!(
                "each logged loss is a mean over {window} steps (grad_norm and learning rate are the last step's): a spike \
                 of one step shows at 1/{window} of its height; logging_steps: 1 costs nothing"
            ),
        )
    })
}

fn checkpoints(run: &Run) -> Vec<Finding> {
    let c = &run.config;
    let mut found = Vec::new();
    let mut add = |key: &str, text: String| {
        found.push(Finding::new(Code::EvidenceLost, Severity::Note, run.place(key), text));
    };
    if c.save_only_model {
        add("save_only_model", "save_only_model: true keeps no optimizer state: neither a resume nor a replay can start from these checkpoints".into());
    }
    let total = run.log.total_steps.map(|t| t as f64);
    if total.is_some_and(|total| c.save_steps > total) && c.save_steps >= 1.0 {
        add("save_steps", format!("save_steps {} lies beyond the last step: only the end is saved", c.save_steps));
    }
    let limit = c.written.get("save_total_limit").and_then(serde_json::Value::as_u64);
    if let Some(limit @ 1..=2) = limit {
        add(
            "save_total_limit",
            format!("save_total_limit {limit}: checkpoints from before a spike are deleted soon after it"),
        );
    }
    found
}

fn versions(run: &Run) -> Vec<Finding> {
    let mut found = Vec::new();
    let Some((transformers, origin)) = &run.versions.transformers else {
        found.push(Finding::new(
            Code::VersionsAssumed,
            Severity::Note,
            run.config_path.display().to_string(),
            "nothing tells which transformers version ran; 5.6.0 is assumed. Give --versions transformers=4.48.2,… or \
             put a versions.json beside the configuration",
        ));
        return found;
    };
    let mut add = |severity, text: String| {
        found.push(Finding::new(
            Code::KnownBadVersions,
            severity,
            format!("transformers {transformers} ({origin})"),
            text,
        ));
    };
    if run.semantics.windows == WindowRule::FloorLeak && run.config.gradient_accumulation_steps > 1 {
        add(
            Severity::Note,
            "transformers 4.47–4.51 miscounts the last window of an epoch: where the batches of an epoch are no multiple \
             of gradient_accumulation_steps, training ends early and a window may leak into the next epoch"
                .into(),
        );
    }
    if run.semantics.resume_order == ResumeOrder::EpochZero {
        let accelerate = run.versions.accelerate.as_ref().map(|(v, _)| v.to_string()).unwrap_or_default();
        add(
            Severity::Note,
            format!("with accelerate {accelerate} a resume inside epoch 2 or later continues in the order of epoch 1"),
        );
    }
    found
}
