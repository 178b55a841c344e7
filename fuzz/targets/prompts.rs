//! Files of prompts: any bytes, in any format. The result is prompts or an error with a line, never a panic.
#![no_main]

use std::fs;

use batch_generate::prompts::{Format, read};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), bytes).unwrap();
    for format in [Format::Auto, Format::Text, Format::Json] {
        if let Ok(prompts) = read(file.path(), format) {
            assert!(!prompts.is_empty());
            assert!(prompts.iter().all(|prompt| prompt.max_tokens != Some(0)));
        }
    }
});
