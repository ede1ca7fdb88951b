//! The same rows without our store: one thread, rusqlite, the schema of `migrations/`, groups of a fixed size.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rusqlite::types::Value;
use rusqlite::{Connection, params_from_iter};

use crate::measure::{Counters, Figures, Run, count, us};
use crate::ours;

pub(crate) async fn run(dir: &Path, limit: Duration, figures: &mut Figures) -> anyhow::Result<()> {
    let template = dir.join("bare-template");
    let rows = Row::written_by_the_store(&template).await?;
    let vacuum: i64 =
        Connection::open(template.join(DATABASE))?.pragma_query_value(None, "auto_vacuum", |row| row.get(0))?;
    let tables: Vec<&str> = rows.iter().map(|row| row.table.as_str()).collect();
    println!("  rows of a job as our store writes them: {}", tables.join(", "));
    for group in [1, 64, 256] {
        let found = inserts(&dir.join(format!("bare-{group}")), vacuum, &rows, group, limit)?;
        let what =
            if group == 1 { "one transaction per job ".to_owned() } else { format!("groups of {group:<3}           ") };
        println!("  {what}         {:>9} jobs/s   {}   {}", count(found.rate()), found.times(), found.costs());
        figures.put(format!("bare.{group}"), found.rate());
    }
    Ok(())
}

const DATABASE: &str = "roundhouse.db";

/// One row that a submission leaves in a table.
struct Row {
    table: String,
    insert: String,
    values: Vec<Value>,
    /// Places of the job's number, tag and model in `values`.
    number: usize,
    tag: Option<usize>,
    model: Option<usize>,
}

impl Row {
    /// Lets the store accept one job and reads what it wrote, so that this page says nothing about the schema twice.
    async fn written_by_the_store(dir: &Path) -> anyhow::Result<Vec<Self>> {
        let store = ours::Ours::open(dir, true).await?;
        let number = store.insert_one().await?;
        drop(store);
        let c = Connection::open(dir.join(DATABASE))?;
        let tables: Vec<String> = c
            .prepare("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%' ORDER BY name")?
            .query_map([], |row| row.get(0))?
            .collect::<Result<_, _>>()?;
        let mut rows = Vec::new();
        for table in tables {
            rows.extend(Self::of_table(&c, &table, number)?);
        }
        anyhow::ensure!(!rows.is_empty(), "the store left no row of job {number} in {}", dir.display());
        Ok(rows)
    }

    fn of_table(c: &Connection, table: &str, number: i64) -> anyhow::Result<Vec<Self>> {
        let columns: Vec<String> = c
            .prepare(&format!("SELECT * FROM {table}"))?
            .column_names()
            .iter()
            .map(|name| (*name).to_owned())
            .collect();
        let place = |name: &str| columns.iter().position(|column| column == name);
        let Some(number_at) = place("number") else { return Ok(Vec::new()) };
        let marks = vec!["?"; columns.len()].join(", ");
        let mut statement = c.prepare(&format!("SELECT * FROM {table} WHERE number = ?1"))?;
        let rows = statement.query_map([number], |row| {
            let values = (0..columns.len()).map(|index| row.get(index)).collect::<Result<_, _>>()?;
            Ok(Self {
                table: table.to_owned(),
                insert: format!("INSERT INTO {table} VALUES ({marks})"),
                values,
                number: number_at,
                tag: place("tag"),
                model: place("model"),
            })
        })?;
        Ok(rows.collect::<Result<_, _>>()?)
    }
}

fn inserts(dir: &Path, vacuum: i64, rows: &[Row], group: u64, limit: Duration) -> anyhow::Result<Run> {
    std::fs::create_dir_all(dir)?;
    let c = database(&dir.join(DATABASE), vacuum)?;
    let mut rows: Vec<(Vec<Value>, &Row)> = rows.iter().map(|row| (row.values.clone(), row)).collect();
    let mut calls = Vec::new();
    let mut number = 0_i64;
    let (begun, before) = (Instant::now(), Counters::now());
    while begun.elapsed() < limit {
        let call = Instant::now();
        c.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
        for _ in 0..group {
            number += 1;
            for (values, row) in &mut rows {
                values[row.number] = Value::Integer(number);
                if let Some(tag) = row.tag {
                    values[tag] = Value::Integer(ours::tag(number));
                }
                if let Some(model) = row.model {
                    values[model] = Value::Integer(1 + i64::try_from(ours::model_index(number))?);
                }
                c.prepare_cached(&row.insert)?.execute(params_from_iter(values.iter()))?;
            }
        }
        c.prepare_cached("COMMIT")?.execute([])?;
        calls.push(us(call.elapsed()));
    }
    Ok(Run::new(number.unsigned_abs(), begun.elapsed(), calls, Counters::now().since(before)))
}

fn database(file: &Path, vacuum: i64) -> anyhow::Result<Connection> {
    let c = Connection::open(file)?;
    c.set_prepared_statement_cache_capacity(64);
    c.execute_batch(&format!("PRAGMA auto_vacuum = {vacuum}"))?;
    c.execute_batch(
        "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA temp_store = MEMORY; PRAGMA cache_size = -32768;
         PRAGMA wal_autocheckpoint = 1000; PRAGMA journal_size_limit = 67108864; PRAGMA trusted_schema = OFF;",
    )?;
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations");
    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder)
        .with_context(|| format!("cannot read {}", folder.display()))?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()?;
    files.sort();
    for path in files {
        let sql = std::fs::read_to_string(&path)?;
        c.execute_batch(&sql).with_context(|| format!("cannot apply {}", path.display()))?;
    }
    let level: i64 = c.pragma_query_value(None, "synchronous", |row| row.get(0))?;
    anyhow::ensure!(level == 2, "{}: synchronous is {level}, not FULL", file.display());
    Ok(c)
}
