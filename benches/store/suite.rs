//! The run: what is measured in which order, and the lines it prints.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use roundhouse::clock::{Clock as _, SystemClock, rfc3339};
use roundhouse::domain::JobId;

use crate::http::{Connection, Load};
use crate::measure::{Figures, Others, Run, count, cpus, short};
use crate::ours::{BATCH, BULK, BULK_CALLERS, Burn, Ours, Queues, claim_and_complete, enqueue, life};
use crate::server::{Server, WORKER_PID};
use crate::{Options, Section, bare, disk, peers, profile, table};

/// Connections of the HTTP loads.
const CONNECTIONS: usize = 64;
/// Up to so many waiting jobs every case gets a database of its own; above, one is made once and used by all.
const OWN_DATABASE_MAX: u64 = 100_000;
/// Share of the processors that others may take before figures are called spoilt.
const QUIET_MAX: f64 = 0.15;
/// How long a started server is left alone before its memory is read.
const SETTLED: Duration = Duration::from_secs(2);
/// How long a job may take to be seen running, or again after its worker's death.
const SEEN_LIMIT: Duration = Duration::from_secs(60);

/// One measurement of the store in this process.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Case {
    Claim,
    Life,
    Enqueue(usize),
    Bulk,
}

impl Case {
    const ALL: [Self; 7] = [
        Self::Claim,
        Self::Life,
        Self::Enqueue(1),
        Self::Enqueue(16),
        Self::Enqueue(64),
        Self::Enqueue(256),
        Self::Bulk,
    ];

    fn parse(name: &str) -> Option<Self> {
        match name {
            "claim" | "complete" => Some(Self::Claim),
            "life" => Some(Self::Life),
            "bulk" => Some(Self::Bulk),
            name => name.strip_prefix("enqueue-")?.parse().ok().map(Self::Enqueue),
        }
    }
}

/// A database with waiting jobs.
struct Base {
    dir: PathBuf,
    queues: Queues,
    /// The oldest job of the first model.
    first: Option<JobId>,
}

struct Suite {
    options: Options,
    dir: PathBuf,
    figures: Figures,
    /// The database with the most waiting jobs, if it is shared by the cases.
    big: Option<(u64, Base)>,
}

/// Removes what the run has written.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    let dir = options.dir.join(format!("bench-store-{}", std::process::id()));
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    // Given to other programs, which may run elsewhere.
    let dir = dir.canonicalize()?;
    let _folder = Folder(dir.clone());
    disk::check(&dir)?;
    crate::ours::set_models(options.models);
    let mut suite = Suite { options, dir, figures: Figures::default(), big: None };
    if let Some(case) = suite.options.profile.clone() {
        return suite.profile(&case).await;
    }
    suite.all().await
}

impl Suite {
    async fn all(&mut self) -> anyhow::Result<()> {
        let begun = Instant::now();
        self.say_where();
        let levels = self.options.levels();
        let most = levels.last().copied().unwrap_or(0);
        let (dir, limit) = (self.dir.clone(), self.options.limit());
        if self.options.wants(Section::Disk) {
            let others = self.head("disk: one thread, a growing file");
            disk::run(&dir, limit, &mut self.figures)?;
            self.tail(&others);
        }
        if self.options.wants(Section::Bare) {
            let others = self.head("bare rusqlite: our schema and rows, one thread, WAL, synchronous=FULL");
            bare::run(&dir, limit, &mut self.figures).await?;
            self.tail(&others);
        }
        if self.options.wants(Section::Store) && levels.contains(&0) {
            self.level(0).await?;
            self.settings_and_load().await?;
            self.purge().await?;
        }
        if self.options.wants(Section::Http) {
            self.http().await?;
        }
        if self.options.wants(Section::Peers) {
            let others = self.head("peers: default settings, the same body, jobs that do nothing");
            peers::run(&self.options, &dir, &mut self.figures);
            self.tail(&others);
        }
        for level in levels.iter().copied().filter(|level| *level > 0 && *level != most) {
            if self.options.wants(Section::Store) {
                self.level(level).await?;
            }
        }
        if self.options.wants(Section::Restart) {
            self.restart(most).await?;
        }
        if self.options.wants(Section::Store) && most > 0 {
            self.level(most).await?;
        }
        if self.options.wants(Section::Disk) {
            let others = self.head("disk, again: how much it changed meanwhile");
            disk::run(&dir, limit / 2, &mut Figures::default())?;
            self.tail(&others);
        }
        println!("\n== targets: FULL, no waiting jobs unless said; every ratio within this run");
        let missed = table::show(&self.figures);
        self.profile_missed(&missed).await?;
        println!("\ntook {:.0} s", begun.elapsed().as_secs_f64());
        Ok(())
    }

    /// Begins a part, if others leave the processors alone; with patience, waits for that.
    fn head(&self, title: &str) -> Others {
        let begun = Instant::now();
        while begun.elapsed().as_secs() < self.options.patience {
            let others = Others::watch();
            std::thread::sleep(Duration::from_secs(1));
            if others.share() <= QUIET_MAX {
                break;
            }
        }
        println!("\n== {title}");
        Others::watch()
    }

    /// Ends a part: says what others took meanwhile, and marks the part's figures if that was too much.
    fn tail(&mut self, others: &Others) {
        let share = others.share();
        let is_noisy = share > QUIET_MAX;
        self.figures.settle(is_noisy);
        let warning = if is_noisy { ": TOO MUCH, these figures are not to be compared" } else { "" };
        println!("  (other processes took {:.0} % of the processors meanwhile{warning})", 100.0 * share);
    }

    fn say_where(&self) {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let cpu = read("/proc/cpuinfo");
        let cpu = cpu
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
            .map_or("?", |(_, name)| name);
        println!("roundhouse store benchmark, {}", rfc3339(SystemClock::default().now()));
        println!("  machine: {} x {cpu}, Linux {}", cpus(), read("/proc/sys/kernel/osrelease").trim());
        println!("  databases in {}, SQLite {}", self.options.dir.display(), rusqlite::version());
        println!(
            "  bodies of {} B, {} models, {:.0} s a measurement",
            crate::ours::BODY_BYTES,
            crate::ours::models(),
            self.options.limit().as_secs_f64()
        );
    }

    /// A database with `level` waiting jobs: the shared one, or a new one.
    async fn base(&mut self, level: u64) -> anyhow::Result<Base> {
        if let Some((_, base)) = self.big.take_if(|(size, _)| *size == level) {
            return Ok(base);
        }
        let dir = self.dir.join(format!("store-{level}"));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir)?;
        let store = Ours::open(&dir.join("data"), true).await?;
        let begun = Instant::now();
        let ids = store.fill(level).await?;
        if level > OWN_DATABASE_MAX {
            let took = begun.elapsed().as_secs_f64();
            println!(
                "  ({} jobs put in through the store's bulk insert in {took:.1} s, {}/s)",
                count(level as f64),
                count(level as f64 / took)
            );
        }
        let first = ids.iter().find(|id| crate::ours::model_index(id.number) == 0).copied();
        let mut queues = Queues::default();
        queues.add(ids);
        Ok(Base { dir, queues, first })
    }

    /// Keeps a large database for the next case, removes a small one.
    fn done_with(&mut self, level: u64, base: Base) {
        if level > OWN_DATABASE_MAX {
            self.big = Some((level, base));
        } else {
            let _ = std::fs::remove_dir_all(&base.dir);
        }
    }

    /// Runs a case; one run, or, for claims, that of the completions too.
    async fn case(&mut self, case: Case, level: u64, fsync: bool) -> anyhow::Result<(Run, Option<Run>)> {
        let base = self.base(level).await?;
        let store = Arc::new(Ours::open(&base.dir.join("data"), fsync).await?);
        self.measure(case, level, base, store).await
    }

    async fn measure(
        &mut self,
        case: Case,
        level: u64,
        mut base: Base,
        store: Arc<Ours>,
    ) -> anyhow::Result<(Run, Option<Run>)> {
        let limit = self.options.limit();
        let found = match case {
            Case::Claim => claim_and_complete(&store, &mut base.queues, limit).await.map(|(a, b)| (a, Some(b))),
            Case::Life => life(&store, 64, limit).await.map(|run| (run, None)),
            Case::Enqueue(callers) => enqueue(&store, callers, 1, limit).await.map(|run| (run, None)),
            Case::Bulk => enqueue(&store, BULK_CALLERS, BULK, limit).await.map(|run| (run, None)),
        };
        drop(store);
        self.done_with(level, base);
        found
    }

    async fn level(&mut self, level: u64) -> anyhow::Result<()> {
        let at = short(level);
        let others = self.head(&format!("our store in this process, {at} jobs waiting before, FULL"));
        let put = |figures: &mut Figures, name: String, value: f64| {
            if level == 0 {
                figures.put(name.clone(), value);
            }
            figures.put(format!("{name}@{at}"), value);
        };
        for case in Case::ALL {
            let (run, completions) = self.case(case, level, true).await?;
            let f = &mut self.figures;
            match case {
                Case::Claim => {
                    println!(
                        "  claim 32, one call after another     {:>9} jobs/s   {}",
                        count(run.rate()),
                        run.times()
                    );
                    f.put(format!("claim.ms@{at}"), run.ms(0.5));
                    let Some(run) = completions else { continue };
                    println!(
                        "  complete 32 with 1 KiB answers       {:>9} jobs/s   {}   {}",
                        count(run.rate()),
                        run.times(),
                        run.costs()
                    );
                    put(f, "complete.batches".to_owned(), run.rate() / BATCH as f64);
                }
                Case::Life => {
                    println!(
                        "  whole life, 64 submitters, 4 workers {:>9} jobs/s   {}",
                        count(run.rate()),
                        run.costs()
                    );
                    put(f, "life".to_owned(), run.rate());
                    put(f, "life.bytes".to_owned(), run.bytes_per_job());
                }
                Case::Enqueue(callers) => {
                    println!(
                        "  enqueue, {callers:>3} submitters             {:>9} jobs/s   {}   {}",
                        count(run.rate()),
                        run.times(),
                        run.costs()
                    );
                    put(f, format!("enqueue-{callers}"), run.rate());
                    put(f, format!("enqueue-{callers}.p50"), run.ms(0.5));
                    put(f, format!("enqueue-{callers}.p999"), run.ms(0.999));
                    put(f, format!("enqueue-{callers}.bytes"), run.bytes_per_job());
                }
                Case::Bulk => {
                    println!(
                        "  enqueue 100 a call, 16 submitters    {:>9} jobs/s   {}   {}",
                        count(run.rate()),
                        run.times(),
                        run.costs()
                    );
                    put(f, "bulk".to_owned(), run.rate());
                }
            }
        }
        self.tail(&others);
        Ok(())
    }

    /// What NORMAL would bring, and what busy processors take; each beside its opposite.
    async fn settings_and_load(&mut self) -> anyhow::Result<()> {
        let others =
            self.head("our store, FULL and then NORMAL (acknowledged before it is on the disk: for comparison only)");
        for (case, name) in
            [(Case::Enqueue(64), "enqueue-64"), (Case::Enqueue(256), "enqueue-256"), (Case::Life, "life")]
        {
            let (full, _) = self.case(case, 0, true).await?;
            let (normal, _) = self.case(case, 0, false).await?;
            let ratio = full.rate() / normal.rate();
            println!("  {name:<36} {:>9} and {} jobs/s   {ratio:.2}", count(full.rate()), count(normal.rate()));
            self.figures.put(format!("full.{name}"), full.rate());
            self.figures.put(format!("normal.{name}"), normal.rate());
        }
        self.tail(&others);
        let others = self
            .head(&format!("our store, alone and then beside {} threads that keep the processors busy, FULL", cpus()));
        let (quiet, _) = self.case(Case::Enqueue(256), 0, true).await?;
        self.figures.put("quiet.enqueue-256", quiet.rate());
        self.tail(&others);
        let burn = Burn::start(cpus());
        let (busy, _) = self.case(Case::Enqueue(256), 0, true).await?;
        drop(burn);
        self.figures.put("busy.enqueue-256", busy.rate());
        self.figures.settle(false);
        println!("  enqueue, 256 submitters              {:>9} and {} jobs/s", count(quiet.rate()), count(busy.rate()));
        Ok(())
    }

    /// What submissions feel of the deletion of old jobs.
    async fn purge(&mut self) -> anyhow::Result<()> {
        let others = self.head("our store, alone and then beside the deletion of old jobs, FULL");
        let dir = self.dir.join("purge");
        let store = Arc::new(Ours::open_forgetful(&dir.join("data")).await?);
        let ids = store.fill(if self.options.quick { 10_000 } else { 40_000 }).await?;
        store.end(&ids).await?;
        let limit = self.options.limit();
        let alone = enqueue(&store, 64, 1, limit).await?;
        let keeping = store.keep_house();
        let beside = enqueue(&store, 64, 1, limit).await?;
        let emptied = store.emptied().await as f64 / limit.as_secs_f64();
        keeping.cancel();
        for (what, run) in [("alone", &alone), ("beside", &beside)] {
            println!("  enqueue,  64 submitters, {what:<6}      {:>9} jobs/s   {}", count(run.rate()), run.times());
        }
        println!("  jobs emptied meanwhile              {:>9}/s", count(emptied));
        self.figures.put("purge.alone.p99", alone.ms(0.99));
        self.figures.put("purge.beside.p99", beside.ms(0.99));
        self.tail(&others);
        drop(store);
        let _ = std::fs::remove_dir_all(&dir);
        Ok(())
    }

    async fn http(&mut self) -> anyhow::Result<()> {
        let others = self.head("our server over HTTP, keep-alive, the client on the same machine");
        let dir = self.dir.join("http");
        std::fs::create_dir_all(&dir)?;
        let server = Server::start(&self.options.server, &dir, false)?;
        let limit = self.options.limit();
        let (run, ids) = Load::single(CONNECTIONS).run(server.address, limit).await?;
        println!("  POST /v1/jobs, 64 connections        {:>9} jobs/s   {}", count(run.rate()), run.times());
        self.figures.put("http-single", run.rate());
        let (run, _) = Load::bulk(BULK_CALLERS, BULK).run(server.address, limit).await?;
        println!("  POST /v1/jobs/bulk of 100, 16        {:>9} jobs/s   {}", count(run.rate()), run.times());
        self.figures.put("http-bulk", run.rate());
        let (run, _) = Load::poll(CONNECTIONS, ids).run(server.address, limit).await?;
        println!("  GET /v1/jobs/{{id}} of waiting jobs    {:>9} polls/s  {}", count(run.rate()), run.times());
        self.figures.put("http-poll", run.rate());
        drop(server);
        self.tail(&others);
        std::fs::remove_dir_all(&dir)?;
        Ok(())
    }

    /// Memory with many waiting jobs, and the way back after `kill -9`.
    async fn restart(&mut self, level: u64) -> anyhow::Result<()> {
        let at = short(level);
        let others = self.head(&format!("our server with {at} waiting jobs: memory, and restart after kill -9"));
        let base = self.base(level).await?;
        let found = self.restarts(&base, &at).await;
        self.done_with(level, base);
        self.tail(&others);
        found
    }

    async fn restarts(&mut self, base: &Base, at: &str) -> anyhow::Result<()> {
        let program = self.options.server.clone();
        let mut server = Server::start(&program, &base.dir, true)?;
        println!("  first start: listening after         {:>9.0} ms", ms(server.listening_after));
        tokio::time::sleep(SETTLED).await;
        let resident = server.resident();
        println!("  resident memory                      {:>9.0} MB", resident / 1e6);
        self.figures.put(format!("restart.resident@{at}"), resident);
        // Something in the log that the next start has to read.
        let (run, _) = Load::single(CONNECTIONS).run(server.address, self.options.limit() / 3).await?;
        println!("  POST /v1/jobs meanwhile              {:>9} jobs/s   {}", count(run.rate()), run.times());
        server.kill();
        let mut server = Server::start(&program, &base.dir, true)?;
        println!("  after kill -9: listening after       {:>9.0} ms", ms(server.listening_after));
        self.figures.put(format!("restart.listening@{at}"), ms(server.listening_after));
        let Some(first) = base.first else {
            println!("  no waiting job, so none to be seen running");
            return Ok(());
        };
        let mut connection = Connection::open(server.address).await?;
        seen(&mut connection, first, |job| job["state"] == "running").await?;
        println!("  after kill -9: first job running at  {:>9.0} ms", ms(server.started.elapsed()));
        self.figures.put(format!("restart.running@{at}"), ms(server.started.elapsed()));
        let pid: i32 = std::fs::read_to_string(base.dir.join(WORKER_PID))?.trim().parse()?;
        let attempt = state(&mut connection, first).await?["attempt"].clone();
        let begun = Instant::now();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)?;
        seen(&mut connection, first, |job| job["state"] != "running" || job["attempt"] != attempt).await?;
        println!("  worker killed: its job back after    {:>9.0} ms", ms(begun.elapsed()));
        self.figures.put("death.again", ms(begun.elapsed()));
        server.kill();
        Ok(())
    }

    /// Where the time of missed targets' cases goes.
    async fn profile_missed(&mut self, missed: &[(&str, &str)]) -> anyhow::Result<()> {
        if missed.is_empty() {
            return Ok(());
        }
        println!("\n== missed");
        let mut seen: Vec<&str> = Vec::new();
        for (figure, case) in missed {
            println!("{figure}: see profile: {case}");
            if !seen.contains(case) {
                seen.push(case);
            }
        }
        if self.options.no_profile {
            return Ok(());
        }
        for case in seen {
            if let Err(error) = self.profile(case).await {
                println!("profile: {case}: not done: {error:#}");
            }
        }
        Ok(())
    }

    /// Runs a case again and watches it.
    async fn profile(&mut self, name: &str) -> anyhow::Result<()> {
        let limit = self.options.limit();
        let dir = self.dir.clone();
        if let Some(case) = Case::parse(name) {
            let level = match case {
                Case::Claim => self.options.levels().last().copied().unwrap_or(0).max(10_000),
                _ => self.options.levels().first().copied().unwrap_or(0),
            };
            let base = self.base(level).await?;
            let store = Arc::new(Ours::open(&base.dir.join("data"), true).await?);
            let watch = profile::Watch::start(&dir, std::process::id(), limit).await;
            let found = self.measure(case, level, base, store).await;
            watch.show(&format!("{name}, {} jobs waiting before", short(level)));
            let (run, _) = found?;
            println!("    (at {} jobs/s while watched)", count(run.rate()));
            return Ok(());
        }
        match name {
            "http-single" | "http-bulk" | "http-poll" => {
                let folder = dir.join("http-profile");
                std::fs::create_dir_all(&folder)?;
                let server = Server::start(&self.options.server, &folder, false)?;
                let load = match name {
                    "http-single" => Load::single(CONNECTIONS),
                    "http-bulk" => Load::bulk(BULK_CALLERS, BULK),
                    _ => {
                        let (_, ids) = Load::single(CONNECTIONS).run(server.address, limit / 4).await?;
                        Load::poll(CONNECTIONS, ids)
                    }
                };
                let watch = profile::Watch::start(&dir, server.pid(), limit).await;
                let (run, _) = load.run(server.address, limit).await?;
                watch.show(&format!("{name}, the server"));
                println!("    (at {} jobs/s while watched)", count(run.rate()));
                drop(server);
                std::fs::remove_dir_all(&folder)?;
                Ok(())
            }
            "restart" => {
                let level = self.options.levels().last().copied().unwrap_or(0);
                let base = self.base(level).await?;
                let found = watch_start(&self.options.server, &base, &dir);
                self.done_with(level, base);
                found
            }
            name => anyhow::bail!(
                "no case `{name}`: enqueue-N, bulk, claim, complete, life, http-single, http-bulk, http-poll, restart"
            ),
        }
    }
}

/// Starts the server under perf's eyes from its first moment.
fn watch_start(program: &Path, base: &Base, dir: &Path) -> anyhow::Result<()> {
    let data = dir.join("perf.data");
    profile::available().map_err(anyhow::Error::msg)?;
    let mut server = Server::start_under(
        program,
        &base.dir,
        Command::new("perf").args(["record", "-q", "-F", "997", "-o"]).arg(&data).arg("--"),
    )?;
    println!("profile: restart: listening after {:.0} ms under perf", ms(server.listening_after));
    server.end_gently();
    profile::show_symbols(&data);
    Ok(())
}

fn ms(took: Duration) -> f64 {
    took.as_secs_f64() * 1e3
}

async fn state(connection: &mut Connection, id: JobId) -> anyhow::Result<serde_json::Value> {
    let (status, body) = connection.get(&format!("/v1/jobs/{id}")).await?;
    anyhow::ensure!(status == 200, "the server answers {status}: {}", String::from_utf8_lossy(body));
    Ok(serde_json::from_slice(body)?)
}

/// Asks every few ms until the job is as wanted.
async fn seen(
    connection: &mut Connection,
    id: JobId,
    wanted: impl Fn(&serde_json::Value) -> bool,
) -> anyhow::Result<()> {
    let begun = Instant::now();
    loop {
        let job = state(connection, id).await?;
        if wanted(&job) {
            return Ok(());
        }
        anyhow::ensure!(begun.elapsed() < SEEN_LIMIT, "job {id} stays {} for {} s", job["state"], SEEN_LIMIT.as_secs());
        tokio::time::sleep(Duration::from_millis(3)).await;
    }
}
