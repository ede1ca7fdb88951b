//! What was learned about models, which outlives a restart.

use std::collections::BTreeMap;

use rusqlite::{Connection, Row, params};
use serde_json::json;

use super::StoreError;
use super::verbs::{Store, execute, int};
use super::writer::{Kind, answer};
use crate::domain::Millis;
use crate::domain::shape::KeptBatches;
use crate::domain::worker::HostCopy;

/// What was learned about a model; durable so that a restart plans as well as before.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Learned {
    /// Cold load, ms.
    pub load_ms: Option<f64>,
    /// Stop until its device memory is free, ms.
    pub stop_ms: Option<f64>,
    /// Service of one job, ms.
    pub service_ms: Option<f64>,
    /// Device time per completed job while jobs wait, ms.
    pub each_ms: Option<f64>,
    /// When it last lost its last worker.
    pub left_at: Option<Millis>,
    /// Load from host memory, ms.
    pub wake_ms: Option<f64>,
    /// What loads have cost of late, from wherever, ms.
    pub reload_ms: Option<f64>,
    /// From the end of its last job to the next arrival, ms.
    pub gap_ms: Option<f64>,
    /// Jobs that waited when it got ready.
    pub waiting_at_load: Option<f64>,
    /// Memory that a worker of it took on each of its devices, as it told last, bytes.
    pub device_bytes: Option<u64>,
    /// Which entry of models.yaml memory was learned of (`ModelSpec::fingerprint`); `None`: an earlier release did not say.
    pub entry: Option<i64>,
    /// What its worker said last of its copy in host memory; `bytes`: what it took when there was one.
    pub host: HostCopy,
    /// Whether that copy is made when a worker is loaded, not when it is parked.
    pub copies_at_load: Option<bool>,
    /// What a parked worker of it kept of each of its GPUs the last time, bytes.
    pub keeps_bytes: Option<u64>,
    /// How many jobs its passes take.
    pub batches: KeptBatches,
}

impl Learned {
    /// What another entry takes of memory is not known yet, nor what its passes do with it.
    pub fn forget_memory(&mut self) {
        (self.device_bytes, self.keeps_bytes, self.copies_at_load) = (None, None, None);
        (self.host, self.batches) = (HostCopy::default(), KeptBatches::default());
    }
}

impl Store {
    /// Keeps what was learned about a model. The order of calls is the order of commits.
    pub fn learn(
        &self,
        model: String,
        learned: Learned,
    ) -> impl Future<Output = Result<(), StoreError>> + Send + use<> {
        let batches = (!learned.batches.shapes.is_empty()).then(|| json!(learned.batches).to_string());
        answer(self.writer.apply(Kind::Change, 0, move |session| {
            execute(
                &session.c,
                "INSERT INTO model (name, load_ms, stop_ms, service_ms, each_ms, left_at, wake_ms, reload_ms, gap_ms,
                     waiting_at_load, device_bytes, entry, host_bytes, can_park, park_note, copies_at_load, keeps_bytes, batches)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18)
                 ON CONFLICT (name) DO UPDATE SET load_ms = excluded.load_ms, stop_ms = excluded.stop_ms,
                     service_ms = excluded.service_ms, each_ms = excluded.each_ms, left_at = excluded.left_at,
                     wake_ms = excluded.wake_ms, reload_ms = excluded.reload_ms, gap_ms = excluded.gap_ms,
                     waiting_at_load = excluded.waiting_at_load, device_bytes = excluded.device_bytes,
                     entry = excluded.entry, host_bytes = excluded.host_bytes, can_park = excluded.can_park,
                     park_note = excluded.park_note, copies_at_load = excluded.copies_at_load,
                     keeps_bytes = excluded.keeps_bytes, batches = excluded.batches",
                params![
                    model,
                    learned.load_ms,
                    learned.stop_ms,
                    learned.service_ms,
                    learned.each_ms,
                    learned.left_at,
                    learned.wake_ms,
                    learned.reload_ms,
                    learned.gap_ms,
                    learned.waiting_at_load,
                    learned.device_bytes.map(int),
                    learned.entry,
                    learned.host.bytes.map(int),
                    learned.host.can_park,
                    learned.host.note,
                    learned.copies_at_load,
                    learned.keeps_bytes.map(int),
                    batches
                ],
            )
        }))
    }
}

/// What earlier runs learned.
pub(super) fn load(c: &Connection) -> Result<BTreeMap<String, Learned>, StoreError> {
    let mut statement = c.prepare(
        "SELECT name, load_ms, stop_ms, service_ms, each_ms, left_at, wake_ms, reload_ms, gap_ms, waiting_at_load, device_bytes,
             entry, host_bytes, can_park, park_note, copies_at_load, keeps_bytes, batches
         FROM model",
    )?;
    let bytes = |row: &Row<'_>, at: usize| row.get::<_, Option<i64>>(at).map(|bytes| bytes.map(i64::unsigned_abs));
    let rows = statement.query_map([], |row| {
        let batches: Option<String> = row.get(17)?;
        let learned = Learned {
            load_ms: row.get(1)?,
            stop_ms: row.get(2)?,
            service_ms: row.get(3)?,
            each_ms: row.get(4)?,
            left_at: row.get(5)?,
            wake_ms: row.get(6)?,
            reload_ms: row.get(7)?,
            gap_ms: row.get(8)?,
            waiting_at_load: row.get(9)?,
            device_bytes: bytes(row, 10)?,
            entry: row.get(11)?,
            host: HostCopy {
                bytes: bytes(row, 12)?,
                can_park: row.get(13)?,
                note: row.get(14)?,
                ..HostCopy::default()
            },
            copies_at_load: row.get(15)?,
            keeps_bytes: bytes(row, 16)?,
            // Advice: what cannot be read is learned again.
            batches: batches.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default(),
        };
        Ok((row.get(0)?, learned))
    })?;
    Ok(rows.collect::<Result<_, _>>()?)
}
