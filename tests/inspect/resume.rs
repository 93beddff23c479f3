//! Resumes that lost state, order, position or schedule.

use super::support::*;

#[test]
fn resumes_without_state_and_with_another_total_are_found() {
    let folder = Folder::new("logging_steps: 1\n");
    let lines = crate::run::log_lines(&[(1, 4, 3.0, 1), (2, 4, 2.0, 2), (3, 8, 2.5, 0), (4, 8, 2.4, 1)]);
    folder.write("out/trainer_log.jsonl", &lines).write("out/checkpoint-2/README.md", "");
    let run = folder.open().unwrap();
    assert!(finding(&run, Code::ResumeWithoutOptimizer).message.contains("neither optimizer.pt nor scheduler.pt"));
    assert!(finding(&run, Code::ResumeOtherTotal).message.contains("8 instead of 4"));
    assert!(finding(&run, Code::AppendedAttempts).message.contains("steps 3–4 from checkpoint-2"));
    folder.write("out/checkpoint-2/optimizer.pt", "").write("out/checkpoint-2/scheduler.pt", "");
    assert!(!codes(&folder.open().unwrap()).contains(&"resume_without_optimizer"));
    std::fs::remove_file(folder.0.path().join("out/checkpoint-2/scheduler.pt")).unwrap();
    assert!(finding(&folder.open().unwrap(), Code::ResumeWithoutOptimizer).message.contains("ignored"));
}

#[test]
fn a_resume_inside_a_later_epoch_depends_on_the_pair_of_versions() {
    let lines: String = [(1u64, 0.3), (2, 0.6), (3, 0.9), (4, 1.2), (5, 1.5)]
        .iter()
        .map(|(s, e)| format!("{{\"current_steps\": {s}, \"total_steps\": 9, \"loss\": 2.0, \"lr\": 0.001, \"epoch\": {e}, \"elapsed_time\": \"0:00:0{}\"}}\n", if *s == 5 { 0 } else { *s }))
        .collect();
    for (transformers, accelerate, wrong) in
        [("4.57.1", "1.11.0", true), ("4.57.1", "1.3.0", false), ("5.6.0", "1.3.0", true), ("5.6.0", "1.11.0", false)]
    {
        let folder = Folder::new("logging_steps: 1\ngradient_accumulation_steps: 3\n");
        folder.write(
            "versions.json",
            &format!("{{\"transformers\": \"{transformers}\", \"accelerate\": \"{accelerate}\"}}"),
        );
        folder.write("out/trainer_log.jsonl", &lines);
        let run = folder.open().unwrap();
        assert_eq!(run.attempts[1].resumed_from, Some(4));
        assert_eq!(codes(&run).contains(&"resume_order"), wrong, "{transformers} {accelerate}");
    }
    let folder = Folder::new("logging_steps: 1\ngradient_accumulation_steps: 3\n");
    folder.write("versions.json", FOUR).write("out/trainer_log.jsonl", &lines);
    assert_eq!(finding(&folder.open().unwrap(), Code::ResumePosition).severity, Severity::Warning);
}
