//! The program as a user sees it: answers and JSON from good input; one line and exit code 1, never a panic, from bad
//! input.

#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "../../inference/tests/common/mod.rs"]
mod common;

use std::fs;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use candle_core::quantized::gguf_file::Value;
use candle_core::{DType, Device, Tensor};
use predicates::prelude::*;
use predicates::str::contains;

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

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::write(&path, content).unwrap();
        path
    }
}

fn command(model: &Path, args: &[&str]) -> Command {
    let mut command = Command::cargo_bin("batch_generate").unwrap();
    command.arg("--model").arg(model).args(args);
    command
}

fn refused(model: &Path, args: &[&str], message: &str) {
    command(model, args).assert().code(1).stderr(contains(message).and(contains("panicked").not()));
}

#[test]
fn prompts_are_answered_and_reported() {
    let world = World::new();
    let prompts =
        world.file("prompts.jsonl", "{\"prompt\": \"Hello there\", \"max_tokens\": 3}\n{\"prompt\": \"1+1=\"}\n");
    let json = world.folder.path().join("out.json");
    let args = ["--max-tokens", "5", "--block-size", "4", "--json", json.to_str().unwrap()];
    let args = [&args[..], &["--prompts", prompts.to_str().unwrap()]].concat();
    command(&world.model, &args).assert().success().stdout(contains("Hello there").and(contains("per reserved slot")));
    let report: serde_json::Value = serde_json::from_str(&fs::read_to_string(json).unwrap()).unwrap();
    let first = &report["sequences"][0];
    assert_eq!((&first["prompt"], &first["prompt_tokens"]), (&"Hello there".into(), &11.into()));
    assert!(first["tokens"].as_array().unwrap().len() <= 3 && first["text"].is_string());
    assert_eq!((&first["cached_tokens"], &first["preemptions"]), (&0.into(), &0.into()));
    assert_eq!((&report["pool"]["blocks"], &report["pool"]["block_size"]), (&256.into(), &4.into()));
    assert!(report["pool"]["peak_blocks"].as_u64().unwrap() >= 4);
    assert!((0.1..=1.0).contains(&report["pool"]["mean_utilisation"].as_f64().unwrap()));
    assert!(report["prefill_tokens_per_s"].as_f64().unwrap() > 0.0);
    assert!(report["steps"].as_u64().unwrap() >= 1);
}

#[test]
fn batches_and_contexts_are_measured() {
    let world = World::new();
    let args = ["--measure", "--batch", "1,3", "--context", "16,32,100"];
    let table = contains("of 16's").and(contains(" threads"));
    command(&world.model, &args)
        .assert()
        .success()
        .stdout(table.and(predicates::str::is_match("(?m)^    3      100 ").unwrap()));
    let refused = |args: &[&str], message| refused(&world.model, args, message);
    refused(&["--measure", "--context", "16", "--batch", "99999999999999"], "error:");
    refused(&["--measure", "--context", "many"], "many");
    refused(&["--batch", "4"], "--measure");
    refused(&["--measure", "--prompts", "x"], "cannot be used with");
}

#[test]
fn weights_can_be_stored_in_several_ways() {
    let world = World::new();
    let prompts = world.file("prompts.txt", "Hello\nAnd you?\n");
    for weights in ["f32", "int8", "stored"] {
        let args = ["--weights", weights, "--max-tokens", "4", "--prompts", prompts.to_str().unwrap()];
        command(&world.model, &args).assert().success().stdout(contains("And you?"));
    }
    refused(&world.model, &["--weights", "int4"], "int4");
}

#[test]
fn help_and_version_are_not_errors() {
    for flag in ["--help", "--version"] {
        Command::cargo_bin("batch_generate").unwrap().arg(flag).assert().success();
    }
}

#[test]
fn each_kind_of_bad_model_file_has_its_message() {
    let world = World::new();
    let whole = fs::read(&world.model).unwrap();
    refused(&world.folder.path().join("none.gguf"), &[], "none.gguf");
    refused(world.folder.path(), &[], "error:");
    refused(&world.file("text.gguf", "not a model"), &[], "is not a GGUF file, or is damaged");
    refused(&world.file("empty.gguf", ""), &[], "is not a GGUF file, or is damaged");
    refused(&world.file("header.gguf", &whole[..600]), &[], "is not a GGUF file, or is damaged");
    let other = world.folder.path().join("other.gguf");
    common::write(&other, "mamba");
    refused(&other, &[], "the model's architecture is `mamba`, only llama, mistral, qwen2,");
}

#[test]
fn the_name_of_a_special_token_in_a_prompt_is_plain_text() {
    let world = World::new();
    let (prompts, json) = (world.file("prompts.txt", "a<end>b"), world.folder.path().join("out.json"));
    let args = ["--max-tokens", "1", "--prompts", prompts.to_str().unwrap(), "--json", json.to_str().unwrap()];
    command(&world.model, &args).assert().success();
    let report: serde_json::Value = serde_json::from_str(&fs::read_to_string(json).unwrap()).unwrap();
    assert_eq!(report["sequences"][0]["prompt_tokens"], 7);
}

#[test]
fn keys_and_tensors_that_are_not_supported_are_refused() {
    let world = World::new();
    let key = |key: &str, value: Value, message: &str| {
        let path = world.folder.path().join("changed.gguf");
        common::write_changed(&path, |metadata, _| drop(metadata.insert(key.into(), value)));
        refused(&path, &[], message);
    };
    key("llama.rope.scaling.type", Value::String("ntk".into()), "`llama.rope.scaling.type` of the model file is `ntk`");
    key("tokenizer.ggml.add_eos_token", Value::Bool(true), "`tokenizer.ggml.add_eos_token` of the model file is true");
    key("general.alignment", Value::U32(0), "`general.alignment`");
    key("llama.context_length", Value::U32(u32::MAX), "`llama.context_length` in the model file is 4294967295");
    key("llama.attention.head_count", Value::U32(0), "`llama.attention.head_count` in the model file is 0");
    key("llama.rope.freq_base", Value::F32(f32::NAN), "`llama.rope.freq_base` in the model file is NaN");
    let tensor = |name: &str, shape: &[usize], message: &str| {
        let path = world.folder.path().join("changed.gguf");
        let tensor = Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap();
        common::write_changed(&path, |_, tensors| drop(tensors.insert(name.into(), tensor)));
        refused(&path, &[], message);
    };
    tensor("rope_freqs.weight", &[5], "the tensor `rope_freqs.weight` of the model file has the shape [5]");
    tensor("blk.0.attn_q.bias", &[32], "the model file has no tensor `blk.1.attn_q.bias`");
    tensor("token_embd.weight", &[32], "the tensor `token_embd.weight` of the model file has the shape [32]");
    tensor("output_norm.weight", &[1, 32], "has the shape [1, 32], the model needs [32]");
    tensor("blk.1.ffn_down.weight", &[64, 32], "has the shape [64, 32], the model needs [32, 64]");
    tensor("token_embd.weight", &[95, 32], "the tokenizer has 96 tokens, the model's embedding 95");
}

#[test]
fn numbers_of_other_integer_types_are_read() {
    let world = World::new();
    let path = world.folder.path().join("wide.gguf");
    common::write_changed(&path, |metadata, _| {
        metadata.values_mut().for_each(|value| {
            if let Value::U32(n) = *value {
                *value = Value::U64(n.into());
            }
        });
    });
    let prompts = world.file("one.txt", "Hello");
    command(&path, &["--max-tokens", "1", "--prompts", prompts.to_str().unwrap()]).assert().success();
}

#[test]
fn absurd_numbers_are_refused() {
    let world = World::new();
    let refused = |args: &[&str], message| refused(&world.model, args, message);
    refused(&["--blocks", "99999999999"], "this machine has");
    refused(&["--blocks", "18446744073709551615"], "this machine has");
    refused(&["--block-size", "99999999999999"], "this machine has");
    refused(&["--blocks", "-1"], "--blocks");
    refused(&["--kv-dtype", "q9"], "q9");
    refused(&["--memory", "9000TiB"], "--memory");
    refused(&["--memory", "1"], "1 bytes do not hold one block");
    refused(&["--memory", "1GiB", "--blocks", "3"], "cannot be used with");
    refused(&["--nonsense"], "--nonsense");
}

#[test]
fn invalid_arguments_are_refused_before_the_model_is_obtained() {
    let world = World::new();
    let none = world.folder.path().join("none.gguf");
    let refused = |args: &[&str], message| refused(&none, args, message);
    refused(&["--blocks", "0"], "a pool of 0 blocks holds nothing");
    refused(&["--block-size", "0"], "a block of 0 tokens holds nothing");
    refused(&["--memory", "9000000GiB"], "this machine has");
    refused(&["--max-tokens", "0"], "at least one");
    refused(&["--samples", "0"], "0 samples");
    refused(&["--samples", "3", "--max-batch", "2"], "3 samples of a prompt do not fit into a batch of 2");
    refused(&["--max-batch", "0"], "do not fit into a batch of 0");
    refused(&["--temperature", "-1"], "temperature");
    refused(&["--temperature", "NaN"], "the temperature NaN is not 0 or more");
    refused(&["--top-p", "2"], "top-p 2 is not above 0 and at most 1");
    refused(&["--measure", "--batch", "1,0"], "a batch of 0");
    refused(&["--measure", "--context", "16,0"], "a context of 0");
    refused(&["--prompts", "no-such-file"], "no-such-file");
    refused(&["--json", world.folder.path().to_str().unwrap()], "cannot write");
    let missing = world.folder.path().join("no/such/folder.json");
    refused(&["--json", missing.to_str().unwrap()], "cannot write");
    // A valid output path leaves no file if something else is wrong.
    let json = world.folder.path().join("out.json");
    refused(&["--json", json.to_str().unwrap()], "none.gguf");
    assert!(!json.exists());
}

#[test]
fn requests_that_do_not_fit_the_model_are_refused_before_its_weights_are_read() {
    let world = World::new();
    let whole = fs::read(&world.model).unwrap();
    let half = world.file("half.gguf", &whole[..whole.len() / 2]);
    let short = world.file("short.txt", "a");
    let short = short.to_str().unwrap();
    let refused = |args: &[&str], message| refused(&half, args, message);
    refused(&["--prompts", short], "truncated or damaged");
    refused(&[], "the model's context is 256 tokens");
    refused(&["--prompts", short, "--max-tokens", "99999999"], "the model's context is 256 tokens");
    refused(&["--prompts", short, "--max-tokens", "18446744073709551615"], "the model's context is 256 tokens");
    refused(&["--prompts", short, "--blocks", "1"], "the pool has 1");
    refused(&["--prompts", short, "--blocks", "99999999999"], "this machine has");
    refused(&["--prompts", short, "--system", "b"], "no chat template");
    refused(&["--measure", "--context", "300"], "the model's context is 256 tokens");
}

#[test]
fn an_older_file_stays_unchanged_until_the_new_one_is_complete() {
    let world = World::new();
    let whole = fs::read(&world.model).unwrap();
    let half = world.file("half.gguf", &whole[..whole.len() / 2]);
    let (short, json) = (world.file("short.txt", "a"), world.file("out.json", "older"));
    let args = ["--prompts", short.to_str().unwrap(), "--max-tokens", "2", "--json", json.to_str().unwrap()];
    refused(&half, &args, "truncated or damaged");
    assert_eq!(fs::read_to_string(&json).unwrap(), "older");
    command(&world.model, &args).assert().success();
    assert!(fs::read_to_string(&json).unwrap().starts_with('{'));
    assert_eq!(fs::read_dir(world.folder.path()).unwrap().count(), 4, "no temporary file is left");
}

#[test]
fn no_character_that_controls_a_terminal_is_printed() {
    let world = World::new();
    let quiet = || contains("\u{1b}").not();
    let (prompts, json) = (world.file("prompts.txt", "a\u{1b}[31mb\u{202e}c"), world.folder.path().join("out.json"));
    let args = ["--max-tokens", "1", "--prompts", prompts.to_str().unwrap(), "--json", json.to_str().unwrap()];
    let shown = contains("\n  1 a\\u{1b}[31mb\\u{202e}c ").and(contains("── 1 ── a\\u{1b}[31mb\\u{202e}c\n"));
    command(&world.model, &args).assert().success().stdout(shown.and(quiet()));
    let report: serde_json::Value = serde_json::from_str(&fs::read_to_string(json).unwrap()).unwrap();
    assert_eq!(report["sequences"][0]["prompt"], "a\u{1b}[31mb\u{202e}c");

    let other = world.folder.path().join("other.gguf");
    common::write(&other, "\u{1b}]0;x\u{7}\nerror");
    let said = contains("architecture is `\\u{1b}]0;x\\u{7}\\nerror`");
    command(&other, &[]).assert().code(1).stderr(said.and(quiet()));
    let lines = world.file("lines.jsonl", "{\"\\u001b[2J\\n\": 1}");
    let said = contains("unknown field `\\u{1b}[2J\\n`");
    let args = ["--prompts", lines.to_str().unwrap()];
    command(&world.model, &args).assert().code(1).stderr(said.and(quiet()));
}

#[test]
fn a_model_without_an_end_token_is_reported() {
    let world = World::new();
    let endless = world.folder.path().join("endless.gguf");
    common::write_changed(&endless, |metadata, _| drop(metadata.remove("tokenizer.ggml.eos_token_id")));
    let prompts = world.file("two.txt", "a\nb");
    let args = ["--max-tokens", "2", "--prompts", prompts.to_str().unwrap()];
    let said = contains("names no end token").count(1);
    command(&endless, &args).assert().success().stderr(said);
    command(&world.model, &args).assert().success().stderr(contains("end token").not());
}

#[test]
fn bad_prompt_files_are_refused() {
    let world = World::new();
    let prompts = |path: &Path, message| refused(&world.model, &["--prompts", path.to_str().unwrap()], message);
    prompts(Path::new("no-such-file"), "no-such-file");
    prompts(world.folder.path(), "cannot read the prompts");
    prompts(&world.file("empty.txt", "\n"), "no prompt was found");
    prompts(&world.file("broken.jsonl", "{\"prompt\": \"a\"}\n\nb\n"), "line 3, column 1: expected value\n");
    prompts(&world.file("none.jsonl", "{\"prompt\": \"a\", \"max_tokens\": 0}"), "line 1, column 31: invalid value");
    prompts(&world.file("binary.txt", [b'a', 0xff, 0x00]), "line 1, column 2: this is not UTF-8");
    prompts(
        &world.file("either", "{name}\n"),
        "line 1, column 2: key must be a string; use --prompts-format text or json",
    );
    prompts(&world.file("huge.txt", "word ".repeat(1000)), "the model's context is 256 tokens");
}

#[test]
fn the_format_of_prompts_is_decided_by_the_option_the_name_or_the_content() {
    let world = World::new();
    let json = world.folder.path().join("out.json");
    let asked = |prompts: &Path, more: &[&str], stdin: &str| -> Vec<String> {
        let args = ["--max-tokens", "1", "--prompts", prompts.to_str().unwrap(), "--json", json.to_str().unwrap()];
        command(&world.model, &args).args(more).write_stdin(stdin).assert().success();
        let report: serde_json::Value = serde_json::from_str(&fs::read_to_string(&json).unwrap()).unwrap();
        report["sequences"].as_array().unwrap().iter().map(|s| s["prompt"].as_str().unwrap().to_owned()).collect()
    };
    // With the byte order mark and the line end of editors and scripts on Windows.
    let object = "\u{feff}{\"prompt\": \"ab\"}\r\n";
    assert_eq!(asked(&world.file("a.jsonl", object), &[], ""), ["ab"]);
    assert_eq!(asked(&world.file("a", object), &[], ""), ["ab"]);
    assert_eq!(asked(&world.file("a.txt", object), &[], ""), ["{\"prompt\": \"ab\"}"]);
    assert_eq!(asked(&world.file("a", "[\"ab\",\n {\"prompt\": \"c\"}]"), &[], ""), ["ab", "c"]);
    assert_eq!(asked(&world.file("a.txt", "[\"ab\"]"), &["--prompts-format", "json"], ""), ["ab"]);
    assert_eq!(asked(&world.file("a", "{name}\nb"), &["--prompts-format", "text"], ""), ["{name}", "b"]);
    assert_eq!(asked(Path::new("-"), &[], "one\ntwo\n"), ["one", "two"]);
    assert_eq!(asked(Path::new("-"), &[], object), ["ab"]);
    refused(&world.model, &["--prompts-format", "json"], "--prompts");
    command(&world.model, &["--prompts", "-"])
        .write_stdin("")
        .assert()
        .code(1)
        .stderr(contains("standard input: no prompt was found"));
}

#[cfg(feature = "verify")]
#[test]
fn answers_equal_candle_s_own() {
    let world = World::new();
    let short = world.file("short.txt", "a\nbc def ghi\n0123456789 0123456789 0123456789\n");
    let short = short.to_str().unwrap();
    for (max_tokens, extra) in
        [("20", &["--block-size", "16"]), ("20", &["--block-size", "1"]), ("30", &["--blocks", "5"])]
    {
        let args = [&["--verify", "--prompts", short, "--max-tokens", max_tokens][..], extra].concat();
        command(&world.model, &args).assert().success().stderr(contains("verified: 3 of 3 sequences"));
    }
    let untied = world.folder.path().join("untied.gguf");
    common::write_changed(&untied, |_, tensors| {
        let output = tensors["token_embd.weight"].neg().unwrap();
        tensors.insert("output.weight".into(), output);
    });
    let args = ["--verify", "--prompts", short, "--max-tokens", "20"];
    command(&untied, &args).assert().success().stderr(contains("verified: 3 of 3 sequences"));
    let brief = world.folder.path().join("brief.gguf");
    common::write_changed(&brief, |metadata, _| drop(metadata.insert("llama.context_length".into(), Value::U32(64))));
    let args = ["--verify", "--prompts", short, "--max-tokens", "1"];
    refused(&brief, &args, "verification needs 128 tokens, the model's context is 64 tokens");
    refused(&world.model, &["--verify", "--temperature", "1"], "use --temperature 0");
    refused(&world.model, &["--verify", "--weights", "int8"], "use --weights exact");
}
