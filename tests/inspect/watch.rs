//! A live log: growing, cut, replaced; evidence kept.

/// A trainer's log as it grows.
fn append(path: &std::path::Path, text: &str) {
    use std::io::Write;
    let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path).unwrap();
    file.write_all(text.as_bytes()).unwrap();
}

#[test]
fn a_watched_log_warns_within_a_line_and_survives_truncation_and_rotation() {
    use spikeprobe::watch::{Event, Tail, Watch};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trainer_log.jsonl");
    let (mut tail, mut watch) = (Tail::new(&path), Watch::default());
    assert_eq!(tail.read().unwrap().lines.len(), 0, "not there yet");
    let smooth: Vec<_> = (1..=30).map(|s| (s, 99, 2.0 - 0.02 * s as f64, 1)).collect();
    append(&path, &crate::run::log_lines(&smooth));
    assert_eq!(watch.lines(&tail.read().unwrap().lines), []);
    // Half a line is not read; its second half completes it, and the spike is told at once.
    let spike = crate::run::log_lines(&[(31, 99, 6.5, 2)]);
    append(&path, &spike[..20]);
    assert_eq!(tail.read().unwrap().lines.len(), 0);
    append(&path, &spike[20..]);
    let events = watch.lines(&tail.read().unwrap().lines);
    assert!(matches!(events.as_slice(), [Event::Spike { step: 31, .. }]), "{events:?}");
    append(&path, &crate::run::log_lines(&[(32, 99, 6.0, 2)]));
    assert_eq!(watch.lines(&tail.read().unwrap().lines), [], "told once");
    // Truncated, then replaced by another file.
    std::fs::write(&path, crate::run::log_lines(&[(1, 99, 2.0, 1)])).unwrap();
    let news = tail.read().unwrap();
    assert!(news.restarted && news.lines.len() == 1);
    std::fs::write(folder.path().join("new"), crate::run::log_lines(&[(1, 9, 2.0, 1), (2, 9, 1.9, 1)])).unwrap();
    std::fs::rename(folder.path().join("new"), &path).unwrap();
    let news = tail.read().unwrap();
    assert!(news.restarted && news.lines.len() == 2);
}

#[test]
fn evidence_is_kept_whole_and_frozen_by_a_spike() {
    use spikeprobe::watch::Keeper;
    let folder = tempfile::tempdir().unwrap();
    let (out, keep) = (folder.path().join("out"), folder.path().join("keep"));
    let save = |step: u64| {
        let dir = out.join(format!("checkpoint-{step}"));
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("trainer_state.json"), "{}").unwrap();
    };
    let mut keeper = Keeper::new(&out, &keep).unwrap();
    save(10);
    assert!(keeper.look().unwrap().is_empty(), "it may still be written");
    assert_eq!(keeper.look().unwrap(), ["checkpoint-10"]);
    for step in [20, 30] {
        save(step);
        keeper.look().unwrap();
        keeper.look().unwrap();
    }
    assert!(!keep.join("checkpoint-10").exists() && keep.join("checkpoint-30/trainer_state.json").exists());
    keeper.freeze();
    save(40);
    keeper.look().unwrap();
    keeper.look().unwrap();
    assert!(keep.join("checkpoint-20").exists() && keep.join("checkpoint-40").exists());
}
