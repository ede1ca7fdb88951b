//! What was said by hand and lasts: kept in `meta`.

use rusqlite::{Connection, OptionalExtension as _};
use serde_json::json;

use super::StoreError;
use super::verbs::{Store, execute};
use super::writer::{Kind, answer};
use crate::domain::Controls;

impl Store {
    /// Keeps what was said by hand. The order of calls is the order of commits.
    pub fn keep_controls(&self, controls: Controls) -> impl Future<Output = Result<(), StoreError>> + Send + use<> {
        let text = json!(controls).to_string();
        answer(self.writer.apply(Kind::Change, 0, move |session| {
            execute(
                &session.c,
                "INSERT INTO meta (key, value) VALUES ('controls', ?1) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
                [&text],
            )
        }))
    }
}

/// What was said by hand. What cannot be read holds no more: better than a server that does not start.
pub(super) fn load(c: &Connection) -> Result<Controls, StoreError> {
    let text: Option<String> =
        c.query_row("SELECT value FROM meta WHERE key = 'controls'", [], |row| row.get(0)).optional()?;
    Ok(text.map_or_else(Controls::default, |text| {
        serde_json::from_str(&text).unwrap_or_else(|error| {
            tracing::warn!("what was paused, drained or pinned by hand cannot be read, and holds no more: {error}");
            Controls::default()
        })
    }))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::clock::ManualClock;
    use crate::domain::Control;
    use crate::store::tests::reopen;

    #[tokio::test]
    async fn the_last_word_is_kept_and_an_unreadable_one_keeps_no_server_down() {
        let dir = tempfile::tempdir().unwrap();
        let clock = Arc::new(ManualClock::at(1_000));
        let opened = reopen(&dir, &clock).await;
        assert_eq!(opened.controls, Controls::default());
        let mut controls = Controls::default();
        for control in [Control::Pause(None), Control::Pin("a".into())] {
            controls.take(&control);
            opened.store.keep_controls(controls.clone()).await.unwrap();
        }
        drop(opened);
        let opened = reopen(&dir, &clock).await;
        assert_eq!(opened.controls, controls);
        let damage = "UPDATE meta SET value = 'x' WHERE key = 'controls'";
        answer(opened.store.writer.apply(Kind::Change, 0, move |session| execute(&session.c, damage, [])))
            .await
            .unwrap();
        drop(opened);
        assert_eq!(reopen(&dir, &clock).await.controls, Controls::default());
    }
}
