//! The program's commands work with every architecture.

use assert_cmd::Command;
use candle_core::quantized::GgmlDType;
use predicates::prelude::*;
use predicates::str::contains;

use crate::cases::{gemma2, gemma3, phi3, qwen2, qwen3, qwen3moe};
use crate::naive::Spec;
use crate::refused::good;
use crate::rotary::Rotary;

#[test]
fn every_architecture_is_verified_measured_and_compared() {
    let mistral = Spec { windows: vec![Some(7); 2], ..Spec::llama(2) };
    let gemma3 = gemma3(Rotary::plain(32, 10_000.0));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    for (spec, is_candle) in [
        (Spec::llama(2), true),
        (mistral, false),
        (qwen2(), true),
        (qwen3(), true),
        (qwen3moe(), false),
        (gemma2(), false),
        (gemma3, false),
        (phi3(), true),
    ] {
        good(&spec).write(&path, GgmlDType::F32);
        let run = |args: &[&str]| {
            let mut command = Command::cargo_bin("batch_generate").unwrap();
            command.arg("--model").arg(&path).args(args);
            command
        };
        let prompts = ["--prompts", "-", "--block-size", "4", "--max-tokens", "40"];
        let reference =
            if is_candle { "are identical to candle's own model" } else { "are identical to the same model" };
        run(&[&["--verify"], &prompts[..]].concat())
            .write_stdin("abc\nA longer one, of several blocks.\n")
            .assert()
            .success()
            .stderr(contains(reference).and(contains("verified: forks and truncations")));
        run(&["--measure", "--batch", "1,3", "--context", "5,40"]).assert().success().stdout(contains("of 5's"));
        let compared = if is_candle { "candle's own loop" } else { "contiguous cache" };
        run(&["--compare"]).assert().success().stdout(contains(compared).and(contains("paged, batch 8")));
    }
}
