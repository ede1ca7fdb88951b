//! The command line. One file per command; commands about a running server talk to its public HTTP API,
//! those about a data dir (`backup`, `restore`, `doctor`) to the store, whether a server runs or not.
//!
//! `serve` and `guard` are only described here: `main` hands them to the modules that do them.

mod api;
mod backup;
mod config;
mod doctor;
mod fetch;
mod install;
mod models;
mod queue;
mod replay;
mod serve;
mod simulate;
mod usage;

use std::io::ErrorKind;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};

pub use backup::{BackupArgs, RestoreArgs};
pub use doctor::DoctorArgs;
pub use install::InstallArgs;
pub use replay::ReplayArgs;
pub use serve::ServeArgs;
pub use simulate::SimulateArgs;

/// A durable, model-aware job scheduler for boxes with one GPU and more models than fit.
#[derive(Debug, Parser)]
#[command(name = "roundhouse", version)]
pub struct Cli {
    /// How much is logged, and how.
    #[command(flatten)]
    pub log: LogArgs,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Flags of all commands about logs, which go to stderr.
#[derive(Clone, Debug, Args)]
pub struct LogArgs {
    /// What is logged, as `info` or `info,roundhouse::scheduler=debug`
    #[arg(id = "log", long = "log", value_name = "FILTER", env = "ROUNDHOUSE_LOG", global = true)]
    pub filter: Option<String>,
    /// Shape of the log
    #[arg(
        id = "log_format",
        long = "log-format",
        value_name = "FORMAT",
        env = "ROUNDHOUSE_LOG_FORMAT",
        default_value = "text",
        global = true
    )]
    pub format: LogFormat,
}

/// Between the memory of GPUs and that of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Way {
    /// From the GPUs.
    Park,
    /// Back.
    Wake,
}

/// Shape of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// A JSON object a line.
    Json,
}

/// What `roundhouse` can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the server
    Serve(ServeArgs),
    /// Start a worker and end it when the server is gone (used by the server itself)
    #[command(hide = true)]
    Guard {
        /// From SIGTERM to SIGKILL of the worker, in ms.
        #[arg(long, default_value_t = 10_000)]
        grace_ms: u64,
        /// Permissions that files of the worker never have, in octal.
        #[arg(long, value_parser = octal)]
        umask: Option<u32>,
        /// The worker's program and its arguments.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        command: Vec<String>,
    },
    /// Take the GPU memory of processes to host memory and back by the driver (used by the server itself)
    #[command(hide = true)]
    Checkpoint {
        /// Which way.
        #[arg(value_enum)]
        way: Way,
        /// The processes; those that use no GPU are left alone.
        #[arg(required = true)]
        pids: Vec<i32>,
    },
    /// The commands that `run` does.
    #[command(flatten)]
    Client(ClientCommand),
}

/// Commands that need no server of their own.
#[derive(Debug, Subcommand)]
pub enum ClientCommand {
    /// Look at the models of a running server, load and unload them by hand, retry a broken one; install models, fetch weights
    #[command(subcommand)]
    Models(ModelsCommand),
    /// Pause, resume, drain and purge the queue of a running server
    #[command(subcommand)]
    Queue(QueueCommand),
    /// Show who had how much of a running server's GPUs, and what swaps took
    Usage(UsageArgs),
    /// Check a model file, print its JSON Schema
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Copy all jobs and their files to a folder; the server may run
    Backup(BackupArgs),
    /// Make a data dir of a backup, or verify one
    Restore(RestoreArgs),
    /// Show where everything lies, how much it takes, and what is wrong
    Doctor(DoctorArgs),
    /// Play a trace of jobs through the scheduler on simulated workers, and measure how it did
    Simulate(SimulateArgs),
    /// Play a trace of jobs on a real server with echo workers, faster by a factor, and compare it with the simulation
    Replay(ReplayArgs),
}

/// `roundhouse models ...`
#[derive(Debug, Subcommand)]
pub enum ModelsCommand {
    /// Show the models of a running server, their state and their queues
    List(ServerArgs),
    /// Try to load a model again that is in back-off or quarantine
    Retry {
        /// Which server.
        #[command(flatten)]
        server: ServerArgs,
        /// Name of the model
        name: String,
    },
    /// Bring a model in as soon as others make room, whether jobs of it wait or not
    Load(ModelArgs),
    /// Stop a model when its running jobs have ended
    Unload(ModelArgs),
    /// Never let other models displace it
    Pin(ModelArgs),
    /// Let other models displace it
    Unpin(ModelArgs),
    /// Fetch the weights of models from Hugging Face (HF_TOKEN is used for gated ones)
    Fetch {
        /// Model file
        #[arg(long, default_value = "models.yaml", env = "ROUNDHOUSE_CONFIG")]
        config: PathBuf,
        /// Names of models; without any, all that have a Hugging Face id
        names: Vec<String>,
    },
    /// Make the environments of models, each with its own packages, and test that they work
    Install(InstallArgs),
}

/// One model of a running server.
#[derive(Clone, Debug, Args)]
pub struct ModelArgs {
    /// Which server.
    #[command(flatten)]
    pub server: ServerArgs,
    /// Name of the model
    pub name: String,
}

/// `roundhouse queue ...`
#[derive(Debug, Subcommand)]
pub enum QueueCommand {
    /// Let no waiting job start; running ones go on and new ones are accepted, also after a restart
    Pause(QueueArgs),
    /// Undo a pause and a drain
    Resume(QueueArgs),
    /// Refuse new jobs and finish those that are there
    Drain(QueueArgs),
    /// Cancel all waiting jobs
    Purge(QueueArgs),
}

/// Whose queue.
#[derive(Clone, Debug, Args)]
pub struct QueueArgs {
    /// Which server.
    #[command(flatten)]
    pub server: ServerArgs,
    /// Only of this model
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
}

/// What of the GPUs' time is shown.
#[derive(Clone, Debug, Args)]
pub struct UsageArgs {
    /// Which server.
    #[command(flatten)]
    pub server: ServerArgs,
    /// A row for each of these
    #[arg(long, value_enum, default_value = "model")]
    pub by: UsageBy,
    /// Since this time, as 2026-09-21T14:00:00Z or seconds; by model and tenant in whole hours
    #[arg(long, value_name = "TIME")]
    pub from: Option<String>,
    /// Until this time
    #[arg(long, value_name = "TIME")]
    pub to: Option<String>,
}

/// Rows of `roundhouse usage`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum UsageBy {
    /// Models.
    Model,
    /// Tenants.
    Tenant,
    /// Batches.
    Batch,
    /// Jobs.
    Job,
}

/// `roundhouse config ...`
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Print the JSON Schema of the model file
    Schema,
    /// Check a model file and say what its models lack
    Check {
        /// Model file
        #[arg(long, default_value = "models.yaml", env = "ROUNDHOUSE_CONFIG")]
        config: PathBuf,
    },
}

/// Which server to talk to; its key comes from ROUNDHOUSE_API_KEY.
#[derive(Clone, Debug, Args)]
pub struct ServerArgs {
    /// Address of the server
    #[arg(long, default_value = "http://127.0.0.1:9000", env = "ROUNDHOUSE_SERVER")]
    pub server: String,
}

fn octal(text: &str) -> Result<u32, String> {
    u32::from_str_radix(text, 8).ok().filter(|mask| *mask <= 0o777).ok_or_else(|| "write 000 to 777".to_owned())
}

/// Does a command; results go to stdout, progress and errors to stderr.
pub async fn run(command: ClientCommand) -> anyhow::Result<ExitCode> {
    let mut out = std::io::stdout().lock();
    match command {
        ClientCommand::Models(ModelsCommand::List(server)) => models::list(&server.connect()?, &mut out).await,
        ClientCommand::Models(ModelsCommand::Retry { server, name }) => {
            models::retry(&server.connect()?, &name, &mut out).await
        }
        ClientCommand::Models(ModelsCommand::Load(args)) => by_hand("load", &args, &mut out).await,
        ClientCommand::Models(ModelsCommand::Unload(args)) => by_hand("unload", &args, &mut out).await,
        ClientCommand::Models(ModelsCommand::Pin(args)) => by_hand("pin", &args, &mut out).await,
        ClientCommand::Models(ModelsCommand::Unpin(args)) => by_hand("unpin", &args, &mut out).await,
        ClientCommand::Queue(command) => {
            let (word, args) = match command {
                QueueCommand::Pause(args) => ("pause", args),
                QueueCommand::Resume(args) => ("resume", args),
                QueueCommand::Drain(args) => ("drain", args),
                QueueCommand::Purge(args) => ("purge", args),
            };
            queue::operate(&args.server.connect()?, word, args.model.as_deref(), &mut out).await
        }
        ClientCommand::Models(ModelsCommand::Fetch { config, names }) => fetch::fetch(&config, &names).await,
        ClientCommand::Models(ModelsCommand::Install(args)) => install::install(&args, &mut out).await,
        ClientCommand::Usage(UsageArgs { server, by, from, to }) => {
            let by = match by {
                UsageBy::Model => "model",
                UsageBy::Tenant => "tenant",
                UsageBy::Batch => "batch",
                UsageBy::Job => "job",
            };
            usage::usage(&server.connect()?, by, from.as_deref(), to.as_deref(), &mut out).await
        }
        ClientCommand::Config(ConfigCommand::Schema) => config::schema(&mut out),
        ClientCommand::Config(ConfigCommand::Check { config }) => config::check(&config, &mut out),
        ClientCommand::Backup(args) => backup::backup(&args, &mut out),
        ClientCommand::Restore(args) => backup::restore(&args, &mut out),
        ClientCommand::Doctor(args) => doctor::doctor(&args, &mut out),
        ClientCommand::Simulate(args) => simulate::simulate(&args, &mut out),
        ClientCommand::Replay(args) => replay::replay(&args, &mut out).await,
    }
}

async fn by_hand(word: &str, args: &ModelArgs, out: &mut dyn std::io::Write) -> anyhow::Result<ExitCode> {
    models::operate(&args.server.connect()?, word, &args.name, out).await
}

/// An error with its causes on one line; a cause that was told already is not told again.
pub fn in_words(error: &anyhow::Error) -> String {
    error.chain().fold(String::new(), |words, cause| match cause.to_string() {
        cause if words.is_empty() => cause,
        cause if words.contains(&cause) => words,
        cause => format!("{words}: {cause}"),
    })
}

/// Exit code of a program that SIGPIPE ended, as a shell tells it.
const UNREAD: u8 = 141;

/// A command whose output nobody reads any more, as behind `| head`, ends without a word.
///
/// # Errors
///
/// Every other error, as it is.
pub fn unless_unread(error: anyhow::Error) -> anyhow::Result<ExitCode> {
    let is_unread = error.downcast_ref::<std::io::Error>().is_some_and(|io| io.kind() == ErrorKind::BrokenPipe);
    if is_unread { Ok(ExitCode::from(UNREAD)) } else { Err(error) }
}

/// `1 job`, `2 jobs`.
fn counted(count: u64, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// The process's own environment, as `config::load` wants it.
fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn causes_are_told_once() {
        let gone = || std::io::Error::from_raw_os_error(2);
        let inner = crate::store::StoreError::File { path: "/x/lock".into(), source: gone() };
        let error = anyhow::Error::from(inner).context("cannot use /x (--data-dir)");
        let words = "cannot use /x (--data-dir): /x/lock: No such file or directory (os error 2)";
        assert_eq!(in_words(&error), words);
        let error = anyhow::Error::from(gone()).context("outer");
        assert_eq!(in_words(&error), "outer: No such file or directory (os error 2)", "what was not told is told");
    }

    #[test]
    fn a_guard_takes_any_words() {
        let words =
            "roundhouse guard --grace-ms 500 --umask 077 -- python server.py --port 1 --log x".split_whitespace();
        let cli = Cli::try_parse_from(words).unwrap();
        let Command::Guard { grace_ms, umask, command } = cli.command else { panic!("{cli:?}") };
        assert_eq!((grace_ms, umask), (500, Some(0o077)));
        assert_eq!(command, ["python", "server.py", "--port", "1", "--log", "x"]);
    }

    #[test]
    fn log_flags_stand_before_or_after_the_command() {
        for words in [["roundhouse", "--log", "debug", "serve"], ["roundhouse", "serve", "--log", "debug"]] {
            let cli = Cli::try_parse_from(words).unwrap();
            assert_eq!(cli.log.filter.as_deref(), Some("debug"));
            assert_eq!(cli.log.format, LogFormat::Text);
        }
    }

    #[test]
    fn commands_have_their_defaults() {
        let cli = Cli::try_parse_from(["roundhouse", "models", "retry", "flux"]).unwrap();
        let Command::Client(ClientCommand::Models(ModelsCommand::Retry { server, name })) = cli.command else {
            panic!("{cli:?}")
        };
        assert_eq!((server.server.as_str(), name.as_str()), ("http://127.0.0.1:9000", "flux"));
    }
}
