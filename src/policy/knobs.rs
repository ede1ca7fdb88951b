//! What a person may set about scheduling; everything else is fixed or learned.

use std::time::Duration;

/// The `scheduler:` section of `models.yaml`.
#[derive(Clone, Debug, PartialEq)]
pub struct Knobs {
    /// Target wait of a caller on the line.
    pub max_wait_interactive: Duration,
    /// Longest a model with batch jobs goes unvisited before it is due.
    pub max_wait_batch: Duration,
    /// Longest hold of a model while a due one waits.
    pub max_visit: Duration,
    /// Share of device time that early swaps may cost in favour of interactive callers over batch work; 0 < b < 1.
    pub swap_budget_interactive: f64,
    /// The same for all other early swaps; 0 < b < 1.
    pub swap_budget_other: f64,
    /// Host memory for parked models.
    pub park_ram: ParkRam,
    /// Most jobs queued in all.
    pub queued_max: usize,
    /// Most jobs queued per tenant.
    pub queued_per_tenant_max: usize,
    /// Most sync calls waiting at once.
    pub waiting_sync_max: usize,
}

/// How much host memory parked models may take together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ParkRam {
    /// Of all that this program and its workers may use; from 0 to 1.
    Share(f64),
    /// So many bytes; 0: nothing is parked.
    Bytes(u64),
}

impl ParkRam {
    /// In bytes, of this much memory; of an unknown amount (`u64::MAX`) no share is taken.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "sizes are far below 2^53 bytes")]
    pub fn of(self, memory_bytes: u64) -> u64 {
        match self {
            Self::Share(_) if memory_bytes == u64::MAX => 0,
            Self::Share(share) => (memory_bytes as f64 * share) as u64,
            Self::Bytes(bytes) => bytes,
        }
    }
}

impl Default for Knobs {
    fn default() -> Self {
        Self {
            max_wait_interactive: Duration::from_secs(60),
            max_wait_batch: Duration::from_secs(15 * 60),
            max_visit: Duration::from_secs(5 * 60),
            swap_budget_interactive: 0.50,
            swap_budget_other: 0.15,
            park_ram: ParkRam::Share(0.6),
            queued_max: 2_000_000,
            queued_per_tenant_max: 500_000,
            waiting_sync_max: 4_000,
        }
    }
}

impl Knobs {
    /// The keys of `scheduler:` whose values differ.
    pub fn edited_keys(&self, other: &Self) -> Vec<&'static str> {
        // All of them, so that a new one is not forgotten.
        let Self {
            max_wait_interactive,
            max_wait_batch,
            max_visit,
            swap_budget_interactive,
            swap_budget_other,
            park_ram,
            queued_max,
            queued_per_tenant_max,
            waiting_sync_max,
        } = self;
        let waits = (max_wait_interactive, max_wait_batch) != (&other.max_wait_interactive, &other.max_wait_batch);
        let budgets =
            (swap_budget_interactive, swap_budget_other) != (&other.swap_budget_interactive, &other.swap_budget_other);
        let all = [
            ("max_wait", waits),
            ("max_visit", max_visit != &other.max_visit),
            ("swap_budget", budgets),
            ("park_ram", park_ram != &other.park_ram),
            ("queued_max", queued_max != &other.queued_max),
            ("queued_per_tenant_max", queued_per_tenant_max != &other.queued_per_tenant_max),
            ("waiting_sync_max", waiting_sync_max != &other.waiting_sync_max),
        ];
        all.into_iter().filter(|(_, is_edited)| *is_edited).map(|(key, _)| key).collect()
    }

    /// Useful running that a swap in favour of an interactive caller must follow, in prices of the swap.
    pub fn rush(&self) -> f64 {
        (1.0 - self.swap_budget_interactive) / self.swap_budget_interactive
    }

    /// Useful running that any other early swap must follow, in prices of the swap (about 6).
    pub fn keep(&self) -> f64 {
        (1.0 - self.swap_budget_other) / self.swap_budget_other
    }
}
