//! Dataset files: json, jsonl and csv, and the alignment of what they hold.
#![no_main]

use libfuzzer_sys::fuzz_target;
use spikeprobe::batches::{Columns, Formatting, Seen, align, parse_rows};

fuzz_target!(|bytes: &[u8]| {
    for extension in ["json", "csv"] {
        let mut seen = Seen::default();
        let _ = parse_rows(extension, &mut &bytes[..], &mut seen, &mut |_, row| {
            for formatting in [Formatting::Alpaca, Formatting::ShareGpt] {
                let _ = align(&row, &Columns { formatting, ..Columns::default() });
            }
            Ok(true)
        });
    }
});
