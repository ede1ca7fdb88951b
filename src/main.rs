//! Parses flags, installs telemetry, calls the library, and turns the outcome into an exit code.

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser as _;
use roundhouse::app::{self, Serve};
use roundhouse::cli::{self, Cli, Command, LogFormat, ServeArgs};
use roundhouse::telemetry;
use roundhouse::worker::{checkpoint, guard};

/// The C library's allocator took a third of the time of a request (`docs/BENCHMARKS.md`).
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    free_at_once();
    let Cli { log, command } = Cli::parse();
    let install = |usual: &str| telemetry::init(log.filter.as_deref(), usual, log.format == LogFormat::Json);
    let outcome = match command {
        // The guard stays a small process: no runtime, no telemetry.
        Command::Guard { grace_ms, umask, command } => {
            return ExitCode::from(u8::try_from(guard::run(grace_ms, umask, command)).unwrap_or(1));
        }
        Command::Checkpoint { way, pids } => return checkpoint(way, &pids),
        Command::Serve(args) => {
            if let Err(refused) = install(telemetry::OF_A_SERVER) {
                return refuse_filter(&refused);
            }
            serve(&args)
        }
        Command::Client(command) => {
            if let Err(refused) = install(telemetry::OF_A_COMMAND) {
                return refuse_filter(&refused);
            }
            block_on(cli::run(command)).or_else(cli::unless_unread)
        }
    };
    outcome.unwrap_or_else(|error| {
        eprint_line(&format!("roundhouse: {}", cli::in_words(&error)));
        ExitCode::FAILURE
    })
}

/// As the parser of the flags does. It cannot do this itself: a worker's guard reads the same variable, and logs nothing.
fn refuse_filter(error: &telemetry::FilterError) -> ExitCode {
    eprint_line(&format!("error: --log (ROUNDHOUSE_LOG): {error}"));
    ExitCode::from(2)
}

/// Its server reads the error.
fn checkpoint(way: cli::Way, pids: &[i32]) -> ExitCode {
    let way = match way {
        cli::Way::Park => checkpoint::Way::Park,
        cli::Way::Wake => checkpoint::Way::Wake,
    };
    match checkpoint::run(way, pids) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprint_line(&error);
            ExitCode::FAILURE
        }
    }
}

fn serve(args: &ServeArgs) -> anyhow::Result<ExitCode> {
    let (config, listen) = args.load(&|name| std::env::var(name).ok())?;
    let data_dir = std::path::absolute(&args.data_dir)
        .with_context(|| format!("--data-dir: `{}` is no folder", args.data_dir.display()))?;
    let serve = Serve { config, data_dir, listen, allow_network_fs: args.allow_network_fs };
    let ended_well = block_on(app::serve(serve))?;
    Ok(if ended_well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn block_on<T>(future: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(future)
}

/// Memory goes back to the system when it is freed, not a second later: models in host RAM need it.
#[expect(unsafe_code, reason = "the allocator's options have no safe face")]
fn free_at_once() {
    /// `mi_option_purge_delay` of mimalloc.h, in ms, which the crate does not name.
    const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;
    // SAFETY: sets an integer, before there are other threads.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, 0) }
}

#[expect(clippy::print_stderr, reason = "the last word to the person who started us")]
fn eprint_line(line: &str) {
    eprintln!("{line}");
}
