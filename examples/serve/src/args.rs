//! The command-line arguments.

use std::net::IpAddr;

use clap::Parser;
use inference::flags::{CacheFlags, ModelFlags};

/// Serves a language model over OpenAI's API, from one paged KV cache.
#[derive(Debug, Clone, Parser)]
#[command(version)]
pub struct Args {
    /// Which model, and how its weights are kept.
    #[command(flatten)]
    pub model: ModelFlags,

    /// The pool of blocks, and what is below it.
    #[command(flatten)]
    pub cache: CacheFlags,

    /// The address to listen on; there is no TLS, so others than loopback need something in front
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    pub host: IpAddr,

    /// The port to listen on; 0 is any that is free
    #[arg(long, value_name = "PORT", default_value_t = 8000)]
    pub port: u16,

    /// The model's name in the API [default: that of its file]
    #[arg(long, value_name = "NAME")]
    pub served_model_name: Option<String>,

    /// A key that clients must send, and whose prompts share nothing with those of other keys; can be given several times
    #[arg(long, value_name = "KEY")]
    pub api_key: Vec<String>,

    /// The most tokens of a prompt and its answer together [default: the model's context]
    #[arg(long, value_name = "N")]
    pub max_model_len: Option<usize>,

    /// Maximum number of sequences that run together
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub max_num_seqs: usize,

    /// Maximum number of requests that wait; more are refused with status 429
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub max_waiting: usize,

    /// The time that a step may take: prompts are computed in chunks, so that others go on
    #[arg(long, value_name = "MS", default_value_t = 250)]
    pub step_time: u64,

    /// The time after which a request is given up, whether it waits or runs
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub request_timeout: u64,

    /// How long requests may go on after the server has been asked to stop
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub shutdown_timeout: u64,

    /// Publish the cache's KV events there, for routers: tcp://127.0.0.1:5557
    #[arg(long, value_name = "ENDPOINT")]
    pub kv_events: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory;
        Args::command().debug_assert();
    }
}
