//! The flags of `roundhouse serve`, and how they are weighed against the environment and the file.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::config::{self, Config, ConfigError, DEFAULT_LISTEN, Problem};

/// Flags of `serve`; each may come from the environment instead.
#[derive(Clone, Debug, Args)]
pub struct ServeArgs {
    /// Model file
    #[arg(long, value_name = "FILE", default_value = "./models.yaml", env = "ROUNDHOUSE_CONFIG")]
    pub config: PathBuf,
    /// Folder of the database, artifacts and logs
    #[arg(long, value_name = "DIR", default_value = "./data", env = "ROUNDHOUSE_DATA_DIR")]
    pub data_dir: PathBuf,
    /// Address to listen on [default: server.listen of the file, else 127.0.0.1:9000]
    #[arg(long, value_name = "HOST:PORT", env = "ROUNDHOUSE_LISTEN")]
    pub listen: Option<String>,
    /// Folder on a disk that outlives the data dir's, where copies of all jobs are kept, and restored from if the data dir is
    /// empty [default: storage.snapshot_dir of the file, else none]
    #[arg(long, value_name = "DIR", env = "ROUNDHOUSE_SNAPSHOT_DIR")]
    pub snapshot_dir: Option<PathBuf>,
    /// How often such a copy is made: seconds, or 90s, 15m, 2h, 1d [default: storage.snapshot_every of the file, else 60s]
    #[arg(long, value_name = "TIME", env = "ROUNDHOUSE_SNAPSHOT_EVERY", value_parser = config::duration)]
    pub snapshot_every: Option<Duration>,
    /// Keep the database on a network file system all the same: one connection, slow, and only as safe as that is
    #[arg(long, env = "ROUNDHOUSE_ALLOW_NETWORK_FS", value_parser = clap::builder::BoolishValueParser::new())]
    pub allow_network_fs: bool,
}

impl ServeArgs {
    /// Reads the file. Returns it with the address to listen on: flag, else environment, else file, else
    /// `DEFAULT_LISTEN`. `env` looks up environment variables.
    pub fn load(&self, env: &dyn Fn(&str) -> Option<String>) -> Result<(Config, String), ConfigError> {
        let weighed = |name: &str| match name {
            // The parser has weighed the flag against the variable already.
            "ROUNDHOUSE_LISTEN" => self.listen.clone(),
            name => env(name),
        };
        let mut config = config::load(&self.config, &weighed)?;
        if let Some(dir) = self.snapshot_dir.as_ref().filter(|dir| !dir.as_os_str().is_empty()) {
            config.storage.snapshot_dir = Some(dir.clone());
        }
        if let Some(every) = self.snapshot_every {
            if config.storage.snapshot_dir.is_none() {
                let message = "--snapshot-every (ROUNDHOUSE_SNAPSHOT_EVERY) says how often, and nobody says where: name a \
                               folder with --snapshot-dir (ROUNDHOUSE_SNAPSHOT_DIR or storage.snapshot_dir), or leave it out";
                let problem = Problem { line: None, is_outside: true, message: message.to_owned() };
                return Err(ConfigError { path: self.config.display().to_string(), problems: vec![problem] });
            }
            config.storage.snapshot_every = every;
        }
        let listen = config.server.listen.clone().unwrap_or_else(|| DEFAULT_LISTEN.to_owned());
        Ok((config, listen))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snapshot_flags_win_over_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("models.yaml");
        let text = "models:\n  m: {type: text, command: x}\nstorage: {snapshot_dir: kept, snapshot_every: 5m}\n";
        std::fs::write(&path, text).unwrap();
        let load = |words: &[&str]| {
            let words =
                ["roundhouse", "serve", "--config", path.to_str().unwrap()].into_iter().chain(words.iter().copied());
            let cli = <crate::cli::Cli as clap::Parser>::try_parse_from(words).unwrap();
            let crate::cli::Command::Serve(args) = cli.command else { panic!("serve") };
            let storage = args.load(&|_| None).unwrap().0.storage;
            (storage.snapshot_dir.unwrap(), storage.snapshot_every)
        };
        assert_eq!(load(&[]), (dir.path().join("kept"), Duration::from_secs(300)), "relative to the file");
        let flags = ["--snapshot-dir", "/v", "--snapshot-every", "90s"];
        assert_eq!(load(&flags), (PathBuf::from("/v"), Duration::from_secs(90)));
    }

    #[test]
    fn how_often_without_where_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("models.yaml");
        std::fs::write(&path, "models:\n  m: {type: text, command: x}\n").unwrap();
        let words = ["roundhouse", "serve", "--config", path.to_str().unwrap(), "--snapshot-every", "90s"];
        let cli = <crate::cli::Cli as clap::Parser>::try_parse_from(words).unwrap();
        let crate::cli::Command::Serve(args) = cli.command else { panic!("serve") };
        let error = args.load(&|_| None).unwrap_err().to_string();
        assert!(error.contains("--snapshot-every") && error.contains("--snapshot-dir"), "{error}");
    }

    #[test]
    fn the_flag_wins_over_the_file_and_the_file_over_the_default() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("models.yaml");
        let models = "models:\n  m: {type: text, command: x}\n";
        let load = |listen: Option<&str>| {
            let args = ServeArgs {
                config: path.clone(),
                data_dir: PathBuf::from("data"),
                listen: listen.map(str::to_owned),
                snapshot_dir: None,
                snapshot_every: None,
                allow_network_fs: false,
            };
            let pod = |name: &str| (name == "RUNPOD_POD_ID").then(|| "pod".to_owned());
            args.load(&pod).unwrap()
        };
        std::fs::write(&path, models).unwrap();
        assert_eq!(load(None).1, "127.0.0.1:9000");
        std::fs::write(&path, format!("{models}server: {{listen: '127.0.0.1:9100'}}\n")).unwrap();
        assert_eq!(load(None).1, "127.0.0.1:9100");
        let (config, listen) = load(Some("0.0.0.0:9200"));
        assert_eq!(listen, "0.0.0.0:9200");
        assert_eq!(config.server.public_url.as_deref(), Some("https://pod-9200.proxy.runpod.net"));
    }
}
