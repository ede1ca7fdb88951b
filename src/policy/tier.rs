//! Which models stay parked in host memory while it is short, and the reasons for that in words.

use serde::Serialize;

use crate::domain::{GpuSet, Millis};
use crate::policy::decision::{Decision, gib, in_gib, seconds, short};

/// A parked model, or one that might be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Parked {
    /// Arrivals per ms.
    pub rate: f64,
    /// Load from disk, ms.
    pub cold_ms: f64,
    /// Load from host memory, ms.
    pub wake_ms: f64,
    /// Host memory it takes, in bytes.
    pub bytes: u64,
}

/// What a parked worker keeps of a device, and what stands against that. All in bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Obstruction {
    /// The device.
    pub gpu: u32,
    /// What it keeps there.
    pub kept: u64,
    /// What another model needs there.
    pub needs: u64,
    /// What is there for that model, if no parked worker keeps any of it.
    pub there: u64,
}

impl Parked {
    /// What keeping it is worth: load time saved per time and byte.
    pub fn worth(&self) -> f64 {
        self.rate * (self.cold_ms - self.wake_ms).max(0.0) / self.bytes.max(1) as f64
    }
}

/// What bringing a worker back would take that is parked without a copy: its process stays, its weights are read again.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bare {
    /// Load from nothing, ms.
    pub cold_ms: f64,
    /// Its wake, ms; `None`: nobody knows.
    pub wake_ms: Option<f64>,
}

/// A process that stays saves at least so much of a load, ms; it keeps memory of its GPU for that.
const BARE_SAVES_MS: f64 = 1_000.0;
/// Of what nobody knows how long it takes, a load of at least so long is worth a try, ms: what is imported and compiled is spared.
const BARE_TRY_MS: f64 = 10_000.0;

impl Bare {
    /// Whether the process is worth keeping: its wake is known to be cheaper than a load, or that is not known and the load
    /// takes long.
    pub fn is_worth_it(&self) -> bool {
        match self.wake_ms {
            Some(wake_ms) => self.cold_ms - wake_ms >= BARE_SAVES_MS,
            None => self.cold_ms >= BARE_TRY_MS,
        }
    }

    fn words(&self) -> String {
        let cold = seconds(self.cold_ms);
        match self.wake_ms {
            Some(wake_ms) => {
                format!("its wake reads the weights again, about {} against {cold} cold", seconds(wake_ms))
            }
            None => {
                format!("its wake reads the weights again; nobody knows yet how long that takes, cold it is {cold}")
            }
        }
    }
}

/// Places of those that go to disk so that the others fit into `budget` bytes: the least worth first, ties to the first of
/// the list. One that takes nothing stays: it makes no room.
pub fn to_drop(parked: &[Parked], budget: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..parked.len()).filter(|place| parked[*place].bytes > 0).collect();
    order.sort_by(|a, b| parked[*a].worth().total_cmp(&parked[*b].worth()));
    let mut total: u64 = parked.iter().map(|p| p.bytes).sum();
    let mut gone = Vec::new();
    for place in order {
        if total <= budget {
            break;
        }
        total -= parked[place].bytes;
        gone.push(place);
    }
    gone
}

/// Host memory for parked workers, as it will be.
#[derive(Clone, Copy, Debug)]
pub struct Tier {
    /// All of it, in bytes.
    pub host: u64,
    /// By those that stay in it, in bytes.
    pub used: u64,
    /// When.
    pub now: Millis,
}

impl Tier {
    fn decide(&self, action: &'static str, name: &str, it: &Parked, reason: String) -> Decision {
        Decision::new(self.now, action, action, reason).of(name).with(&[
            ("gib", in_gib(it.bytes)),
            ("host_gib", in_gib(self.host)),
            ("host_used_gib", in_gib(self.used)),
            ("cold_s", it.cold_ms / 1e3),
            ("wake_s", it.wake_ms / 1e3),
            ("jobs_per_s", it.rate * 1e3),
        ])
    }

    /// A worker that leaves its devices stays in host memory.
    pub fn park(&self, name: &str, it: &Parked) -> Decision {
        let reason = format!(
            "park {name}: a wake takes {}, a load from disk {}; it takes {} of host memory, {} of {} are in use then",
            seconds(it.wake_ms),
            seconds(it.cold_ms),
            gib(it.bytes),
            gib(self.used),
            gib(self.host)
        );
        self.decide("park", name, it, reason)
    }

    /// A worker that leaves its devices keeps its process and no copy: there is no room for one, or its worker says why not.
    pub fn bare(&self, name: &str, it: &Parked, refusal: Option<&str>, bare: &Bare) -> Decision {
        let left = gib(self.host.saturating_sub(self.used));
        let why = match refusal {
            Some(note) => says(note),
            None => format!("{} of host memory were wanted, {left} are left", gib(it.bytes)),
        };
        let wake_ms = bare.wake_ms.unwrap_or(bare.cold_ms);
        let reason = format!("park {name} without a copy: {why}; {}", bare.words());
        Decision { code: "bare", ..self.decide("park", name, &Parked { wake_ms, ..*it }, reason) }
    }

    /// The process of a worker that is parked without a copy ends.
    pub fn end_bare(&self, name: &str, it: &Parked, why: &str) -> Decision {
        let reason = format!("drop {name}, which is parked without a copy: {why}");
        self.decide("drop", name, &Parked { bytes: 0, ..*it }, reason)
    }

    /// A parked worker ends, since another one ran out of memory on a set where its process keeps some.
    pub fn beside_oom(&self, name: &str, bare: bool, it: &Parked, (other, set): (&str, GpuSet)) -> Decision {
        let why = format!("{other} ran out of memory on {set}, of which its process keeps some");
        let decision = match bare {
            true => self.end_bare(name, it, &why),
            false => self.decide("drop", name, it, format!("drop {name} from host memory: {why}")),
        };
        decision.against(other)
    }

    /// A parked worker leaves host memory, since another comes.
    pub fn drop(&self, name: &str, it: &Parked, other: &str) -> Decision {
        let reason = format!("drop {name} from host memory: {}", self.worth(it));
        self.decide("drop", name, it, reason).against(other)
    }

    /// A parked worker leaves host memory, of which there is less than there was.
    pub fn shrunk(&self, name: &str, it: &Parked) -> Decision {
        let reason = format!("drop {name} from host memory: park_ram was edited, {}", self.worth(it));
        self.decide("drop", name, it, reason)
    }

    /// A parked worker is wanted where it cannot wake, and loads from disk there.
    pub fn elsewhere(&self, name: &str, it: &Parked, (lies, wanted): (GpuSet, GpuSet)) -> Decision {
        let reason = format!(
            "drop {name} from host memory: it is parked on {lies} and wanted on {wanted}, where it cannot wake; a load from \
             disk takes {}",
            seconds(it.cold_ms)
        );
        self.decide("drop", name, it, reason)
    }

    /// A parked worker leaves host memory, since what its process keeps of a device is in another's way.
    pub fn in_the_way(&self, name: &str, it: &Parked, obstruction: &Obstruction, other: &str) -> Decision {
        let reason = format!("drop {name} from host memory: its process keeps {}", obstruction.words(other));
        self.decide("drop", name, it, reason).against(other).with(&obstruction.numbers())
    }

    /// A worker that leaves its devices is not parked, since what its process would keep of one would be in another's way.
    pub fn would_be_in_the_way(&self, name: &str, it: &Parked, obstruction: &Obstruction, other: &str) -> Decision {
        let reason = format!("stop {name} without parking it: its process would keep {}", obstruction.words(other));
        self.decide("drop", name, it, reason).against(other).with(&obstruction.numbers())
    }

    /// A worker that leaves its devices is not parked, though the tier is on.
    pub fn stop(&self, name: &str, it: &Parked) -> Decision {
        let reason = if it.bytes == 0 {
            format!("stop {name} without parking it: nobody has told yet how much host memory it would take")
        } else if it.bytes > self.host {
            format!("stop {name} without parking it: it takes {}, and host memory is {}", gib(it.bytes), gib(self.host))
        } else {
            format!("stop {name} without parking it: {}", self.worth(it))
        };
        self.decide("drop", name, it, reason)
    }

    /// A worker that leaves its devices says that it cannot be parked.
    pub fn refused(&self, name: &str, it: &Parked, note: Option<&str>) -> Decision {
        let reason = format!("stop {name} without parking it: {}", says(note.unwrap_or_default()));
        self.decide("drop", name, it, reason)
    }

    fn worth(&self, it: &Parked) -> String {
        format!(
            "{} of host memory are too few, and it saves least there for its {} ({} a load, {} jobs an hour)",
            gib(self.host),
            gib(it.bytes),
            seconds(it.cold_ms - it.wake_ms),
            short(it.rate * 3.6e9)
        )
    }
}

impl Obstruction {
    fn words(&self, other: &str) -> String {
        let gpu = GpuSet::one(self.gpu);
        format!("{} of {gpu}, where {other} needs {} of {}", gib(self.kept), tenths(self.needs), tenths(self.there))
    }

    fn numbers(&self) -> [(&'static str, f64); 3] {
        [("kept_gib", in_gib(self.kept)), ("needs_gib", in_gib(self.needs)), ("free_gib", in_gib(self.there))]
    }
}

/// `78.4 GiB`: what is close to it must not look the same.
fn tenths(bytes: u64) -> String {
    format!("{:.1} GiB", in_gib(bytes))
}

/// Whether a model can be parked.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Outlook {
    /// `None`: nobody knows yet.
    pub can: Option<bool>,
    /// Why, in words.
    pub why: String,
    /// Where it cannot be: whether its process would stay all the same, and its weights be read again.
    #[serde(rename = "without_copy")]
    pub bare: bool,
}

impl Outlook {
    /// As it is, if its process stays where its copy cannot.
    #[must_use]
    pub fn or_bare(self, bare: &Bare) -> Self {
        if self.can != Some(false) {
            return self;
        }
        let why = format!("{}; it is parked without a copy: {}", self.why, bare.words());
        Self { why, bare: true, ..self }
    }
}

/// Whether a model that takes so many bytes of host memory (0: nobody knows) can be parked in the `host` bytes that there are
/// for it, of this machine's `memory`. `refusal`: its worker says that it cannot, and why; `note`: what else it says about that.
pub fn outlook(bytes: u64, (host, memory): (u64, Option<u64>), refusal: Option<&str>, note: Option<&str>) -> Outlook {
    let (can, why) = match refusal {
        _ if host == 0 => (Some(false), "scheduler.park_ram is 0".to_owned()),
        Some(refusal) => (Some(false), says(refusal)),
        None if bytes == 0 => (None, "it is not known what it takes: set `memory`, or its worker tells".to_owned()),
        None if bytes > host => {
            let then = match memory.filter(|memory| *memory < bytes) {
                Some(memory) => format!("this machine has {}", gib(memory)),
                None => "raise that".to_owned(),
            };
            (Some(false), format!("it takes {}, and scheduler.park_ram is {}; {then}", gib(bytes), gib(host)))
        }
        None => (Some(true), format!("it takes {} of {} of host memory", gib(bytes), gib(host))),
    };
    let note = note.filter(|_| refusal.is_none()).map_or(String::new(), |note| format!("; its worker says: {note}"));
    Outlook { can, why: why + &note, bare: false }
}

fn says(note: &str) -> String {
    if note.is_empty() {
        "its worker says that it cannot be".to_owned()
    } else {
        format!("its worker says that it cannot be: {note}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parked(rate: f64, cold_ms: f64, bytes: u64) -> Parked {
        Parked { rate, cold_ms, wake_ms: 1_000.0, bytes }
    }

    #[test]
    fn the_model_that_saves_least_per_byte_goes_first() {
        let all = [parked(1.0, 41_000.0, 40), parked(0.1, 91_000.0, 40), parked(0.5, 21_000.0, 10)];
        assert_eq!(to_drop(&all, 90), [0_usize; 0]);
        assert_eq!(to_drop(&all, 80), [1]);
        assert_eq!(to_drop(&all, 49), [1, 0]);
        assert_eq!(to_drop(&all, 0), [1, 0, 2]);
        // It saves nothing, and its end would free nothing.
        let all = [parked(0.0, 1_000.0, 0), parked(1.0, 41_000.0, 40), parked(0.1, 91_000.0, 40)];
        assert_eq!(to_drop(&all, 40), [2]);
    }

    #[test]
    fn a_model_that_can_be_parked_or_not_says_so() {
        let gib = 1 << 30;
        let all = [
            (outlook(0, (0, None), None, None), Some(false), "scheduler.park_ram is 0"),
            (
                outlook(0, (gib, None), None, None),
                None,
                "it is not known what it takes: set `memory`, or its worker tells",
            ),
            (
                outlook(2 * gib, (gib, None), None, None),
                Some(false),
                "it takes 2 GiB, and scheduler.park_ram is 1 GiB; raise that",
            ),
            (
                outlook(2 * gib, (gib, Some(3 * gib)), None, None),
                Some(false),
                "it takes 2 GiB, and scheduler.park_ram is 1 GiB; raise that",
            ),
            (
                outlook(4 * gib, (gib, Some(3 * gib)), None, None),
                Some(false),
                "it takes 4 GiB, and scheduler.park_ram is 1 GiB; this machine has 3 GiB",
            ),
            (
                outlook(gib, (gib, None), Some("no room"), Some("no room")),
                Some(false),
                "its worker says that it cannot be: no room",
            ),
            (outlook(gib, (gib, None), Some(""), None), Some(false), "its worker says that it cannot be"),
            (
                outlook(gib, (2 * gib, None), None, Some("the copy is pageable")),
                Some(true),
                "it takes 1 GiB of 2 GiB of host memory; its worker says: the copy is pageable",
            ),
        ];
        for (outlook, can, why) in all {
            assert_eq!((outlook.can, outlook.why.as_str()), (can, why));
        }
    }

    #[test]
    fn each_of_them_says_why() {
        let gib = 1 << 30;
        let it = Parked { rate: 0.5 / 3.6e6, cold_ms: 28_000.0, wake_ms: 2_800.0, bytes: 24 * gib };
        let tier = Tier { host: 64 * gib, used: 40 * gib, now: 7 };
        let decision = tier.park("flux", &it);
        assert_eq!((decision.at, decision.action, decision.code), (7, "park", "park"));
        assert_eq!(decision.numbers["host_used_gib"], 40.0);
        assert_eq!(
            decision.reason,
            "park flux: a wake takes 2.8 s, a load from disk 28 s; it takes 24 GiB of host memory, 40 GiB of 64 GiB are in \
             use then"
        );
        let decision = tier.drop("flux", &it, "llama");
        assert_eq!((decision.action, decision.code, decision.other.as_deref()), ("drop", "drop", Some("llama")));
        assert_eq!(
            decision.reason,
            "drop flux from host memory: 64 GiB of host memory are too few, and it saves least there for its \
             24 GiB (25 s a load, 0.5 jobs an hour)"
        );
        assert!(tier.stop("flux", &it).reason.starts_with("stop flux without parking it: 64 GiB of host memory are"));
        let small = Tier { host: 10 * gib, ..tier };
        assert_eq!(
            small.stop("flux", &it).reason,
            "stop flux without parking it: it takes 24 GiB, and host memory is 10 GiB"
        );
    }

    #[test]
    fn a_process_is_kept_without_a_copy_if_that_is_known_to_save_or_worth_a_try() {
        let bare = |cold_ms, wake_ms| Bare { cold_ms, wake_ms }.is_worth_it();
        assert!(bare(14_000.0, Some(5_000.0)) && bare(14_000.0, Some(13_000.0)) && bare(10_000.0, None));
        assert!(!bare(14_000.0, Some(13_500.0)) && !bare(5_000.0, Some(9_000.0)) && !bare(9_999.0, None));
        let gib = 1 << 30;
        let it = Parked { rate: 0.0, cold_ms: 14_000.0, wake_ms: 400.0, bytes: 34 * gib };
        let tier = Tier { host: 60 * gib, used: 48 * gib, now: 7 };
        let known = Bare { cold_ms: 14_000.0, wake_ms: Some(5_000.0) };
        let decision = tier.bare("flux", &it, None, &known);
        assert_eq!((decision.action, decision.code, decision.numbers["wake_s"]), ("park", "bare", 5.0));
        assert_eq!(
            decision.reason,
            "park flux without a copy: 34 GiB of host memory were wanted, 12 GiB are left; its wake reads the weights again, \
             about 5 s against 14 s cold"
        );
        let refused = outlook(34 * gib, (12 * gib, None), None, None).or_bare(&known);
        assert!(refused.bare && refused.why.contains("; it is parked without a copy: its wake reads"));
        assert!(!outlook(gib, (12 * gib, None), None, None).or_bare(&known).bare, "it can be parked with one");
    }
}
