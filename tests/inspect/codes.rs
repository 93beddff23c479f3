//! The table of codes against the sources and these tests.

use super::support::*;

/// The table of codes: words are unique, every code is made somewhere, and every code is tried by a test here.
#[test]
fn the_table_of_codes_is_held_against_the_sources() {
    let words: std::collections::HashSet<_> = Code::ALL.iter().map(|c| c.word()).collect();
    assert_eq!(words.len(), Code::ALL.len());
    let (sources, tests) = (texts("src/inspect"), texts("tests/inspect"));
    for code in Code::ALL {
        let name = format!("Code::{code:?}");
        assert!(sources.contains(&name), "{name} is never made");
        assert!(tests.contains(&name) || tests.contains(&format!("\"{}\"", code.word())), "{name} is never tried");
    }
}

/// All files of a folder but its codes.rs.
fn texts(folder: &str) -> String {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let paths = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    paths.filter(|p| !p.ends_with("codes.rs")).map(|p| std::fs::read_to_string(p).unwrap()).collect()
}
