//! Two runs side by side.

use spikeprobe::inspect::compare;

use super::support::*;

#[test]
fn two_runs_are_compared_by_what_can_explain_their_difference() {
    let a = five("seed: 1\n", &healthy(20)).open().unwrap();
    let b = five("seed: 2\nweight_decay: 0.1\nmax_grad_norm: 0.5\n", &with(20, row(5, json!(3.0), json!(1.0))))
        .open()
        .unwrap();
    let comparison = compare::compare(&a, &b);
    assert_eq!((comparison.parts_at, comparison.common_steps), (Some(5), 20));
    assert_eq!(comparison.differences[0].what, "max_grad_norm", "{:?}", comparison.differences);
    assert!(comparison.differences.iter().any(|d| d.what == "seed"));
    assert_eq!(compare::compare(&a, &a).parts_at, None);
    assert_eq!(compare::compare(&a, &a).differences, []);
}

#[test]
fn weights_and_adapters_are_compared_by_content_and_rows_by_tokens() {
    use spikeprobe::batches::Corpus;
    let (one, two) = (five("", &healthy(4)), five("", &healthy(4)));
    let write = |folder: &Folder, weights: &str, adapter: &str| {
        folder.write("model/model.safetensors", weights);
        folder.write("out/checkpoint-2/adapter_model.safetensors", adapter);
        folder.write("out/checkpoint-4/adapter_model.safetensors", "end");
    };
    write(&one, "weights of a base model, the same length", "a");
    write(&two, "weights of a base model, the same length", "a");
    let compared = || compare::compare(&one.open().unwrap(), &two.open().unwrap()).differences;
    assert_eq!(compared(), []);
    write(&two, "weights of a base model, the same lengtH", "b");
    let found: Vec<String> = compared().into_iter().map(|d| d.what).collect();
    assert_eq!(found, ["base weights", "adapter at checkpoint-2"], "one byte is enough");
    // Rows: fixtures with a tokenizer.
    let folder = tempfile::tempdir().unwrap();
    let copy = |from: &str, to: &str| {
        for file in std::fs::read_dir(fixture(from)).unwrap().map(|f| f.unwrap().path()) {
            let to = folder.path().join(to).join(file.file_name().unwrap());
            std::fs::create_dir_all(to.parent().unwrap()).unwrap();
            std::fs::copy(&file, to).unwrap();
        }
    };
    copy("vectors/tiny_llama/base", "model");
    copy("eval/run/tokenizer", "model");
    copy("eval/run/data", "data");
    let yaml = "model_name_or_path: model\nstage: sft\ndo_train: true\nfinetuning_type: lora\ndataset: held_out\n\
                template: empty\noutput_dir: out\ndataset_dir: data\n";
    std::fs::write(folder.path().join("train.yaml"), yaml).unwrap();
    let corpus = || {
        let run = Run::open_for_inspection(folder.path(), folder.path(), &[]).unwrap();
        Corpus::load(&run, &run.config).unwrap()
    };
    let before = corpus();
    assert_eq!(compare::rows(&before, &before), None);
    let path = folder.path().join("data/held_out.json");
    let mut rows: Vec<Value> = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    rows[3]["output"] = json!("t9 t9 t9");
    std::fs::write(&path, json!(rows).to_string()).unwrap();
    let changed = compare::rows(&before, &corpus()).unwrap();
    assert!(changed.run.contains("1 of 11 differ: held_out:3"), "{changed:?}");
}
