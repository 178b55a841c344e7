//! A prefix outlives its process: with `--prefix-cache`, the next run reads what this one has computed, and answers the
//! same.

#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "../../inference/tests/common/mod.rs"]
mod common;

use std::fs;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use predicates::prelude::*;
use predicates::str::contains;
use serde_json::Value;

struct World {
    folder: tempfile::TempDir,
    model: PathBuf,
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("tiny.gguf");
        common::write(&model, "llama");
        Self { folder, model }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, dtype: &str, args: &[&str]) -> Command {
        let prompts = self.path("prompts.json");
        let system = "A long text that both prompts begin with, so that it is more than a block.";
        fs::write(&prompts, format!(r#"[{{"prompt": "{system} One."}}, {{"prompt": "{system} Two."}}]"#)).unwrap();
        let mut command = Command::cargo_bin("batch_generate").unwrap();
        command.arg("--model").arg(&self.model).arg("--prompts").arg(prompts);
        command.args(["--max-tokens", "9", "--weights", "exact", "--kv-dtype", dtype]).args(args);
        command
    }

    /// The tokens of all answers, and how many tokens of prompts were computed, how many were read from the file, and
    /// how many blocks were stored.
    fn run(&self, dtype: &str, tier: Option<&Path>) -> (Vec<Value>, [u64; 3]) {
        let json = self.path("out.json");
        let mut args = vec!["--json", json.to_str().unwrap()];
        args.extend(tier.iter().flat_map(|path| ["--prefix-cache", path.to_str().unwrap()]));
        self.command(dtype, &args).assert().success();
        let report: Value = serde_json::from_str(&fs::read_to_string(json).unwrap()).unwrap();
        let tokens = report["sequences"].as_array().unwrap().iter().map(|of| of["tokens"].clone()).collect();
        let of = |value: &Value| value.as_u64().unwrap_or(0);
        let prefix = &report["prefix"];
        let tier = &prefix["tier"];
        assert_eq!(of(&tier["lost_blocks"]), 0);
        (tokens, [of(&prefix["computed_prompt_tokens"]), of(&tier["tokens"]), of(&tier["stored_blocks"])])
    }
}

#[test]
fn the_next_run_reads_what_this_one_computed() {
    let world = World::new();
    for dtype in ["f32", "f16", "bf16", "int8"] {
        let (alone, [computed, ..]) = world.run(dtype, None);
        // One file for all types: nothing of another type is found.
        let file = world.path("cache");
        let (first, [of_first, read, stored]) = world.run(dtype, Some(&file));
        assert_eq!((&first, of_first, read), (&alone, computed, 0), "{dtype}");
        assert!(stored > 5);
        let (second, [of_second, read, stored]) = world.run(dtype, Some(&file));
        assert_eq!((&second, stored), (&alone, 0), "{dtype}");
        // The second prompt finds in the pool what the first one has read.
        assert!(read >= 64 && of_second + read <= computed && of_second < 32, "{dtype}: {of_second}, {read}");
    }
}

#[test]
fn damaged_and_foreign_files() {
    let world = World::new();
    let file = world.path("cache");
    let (alone, [computed, ..]) = world.run("f32", Some(&file));
    let whole = fs::read(&file).unwrap();
    // Each slot is damaged somewhere, and the file is cut.
    let mut damaged = whole.clone();
    damaged[4096..].iter_mut().step_by(1000).for_each(|byte| *byte ^= 1);
    for bytes in [&damaged[..], &whole[..4096 + 300], &whole[..100], &[]] {
        fs::write(&file, bytes).unwrap();
        let (tokens, [of_this, read, _]) = world.run("f32", Some(&file));
        assert_eq!((tokens, of_this, read), (alone.clone(), computed, 0));
    }
    let letter = world.path("letter");
    fs::write(&letter, "Dear reader").unwrap();
    for (args, message) in [
        (vec!["--prefix-cache", letter.to_str().unwrap()], "is not a file of a disk tier"),
        (vec!["--prefix-cache", "/no/such/folder/cache"], "/no/such/folder/cache"),
        (vec!["--prefix-cache", file.to_str().unwrap(), "--prefix-cache-size", "4096"], "has no room for a block"),
        (vec!["--prefix-cache-size", "1GiB"], "--prefix-cache"),
    ] {
        let is_one_line = contains(message).and(contains("panicked").not());
        world.command("f32", &args).assert().failure().stderr(is_one_line);
    }
    assert_eq!(fs::read_to_string(letter).unwrap(), "Dear reader");
}
