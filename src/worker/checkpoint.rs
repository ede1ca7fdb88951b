//! The driver's process checkpoint: takes whatever a process has on its GPUs to host memory and back, with no code of the
//! process's own. `cuCheckpointProcess*` of libcuda (driver 570 or newer), loaded when it is needed.
//!
//! The calls are made by a process of their own, `roundhouse checkpoint`: they take tens of seconds (1.4 GB/s to host memory and
//! 4.3 GB/s back were measured on an H100), and a driver that hangs or crashes in them must not take the server along.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::path::Path;
use std::process::Stdio;

use nix::sys::signal::Signal;
use tokio::process::Command;

use crate::worker::procfs::Family;

/// How long a process may take to finish the work on its GPUs that has begun.
const LOCK_TIMEOUT_MS: c_uint = 10_000;
/// Names the library instead of `libcuda.so.1`, for tests.
const LIBRARY: &str = "ROUNDHOUSE_LIBCUDA";

/// Which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the GPUs to host memory.
    Park,
    /// Back.
    Wake,
}

/// What the driver says of a process, as in cuda.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Running,
    Locked,
    Checkpointed,
    Failed,
}

/// One step that is done to a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Lock,
    Checkpoint,
    Restore,
    Unlock,
}

/// The driver, as far as it is needed here. Errors are names of driver errors.
trait Driver: Sync {
    /// Its state; an error if it does not use a GPU.
    fn state(&self, pid: i32) -> Result<State, String>;
    fn step(&self, step: Step, pid: i32) -> Result<(), String>;
}

/// Has a process of `program` take the worker of `family` the given way; an error is for a person. Dropping it ends that
/// process, and nobody knows then how far it came.
pub(super) async fn take(program: &Path, way: Way, family: Family, guard: u32) -> Result<(), String> {
    let living = tokio::task::spawn_blocking(move || family.living(Some(guard.cast_signed())));
    let pids: Vec<String> = living.await.unwrap_or_default().iter().map(|process| process.pid.to_string()).collect();
    if pids.is_empty() {
        return Err("it has no process".to_owned());
    }
    let word = if way == Way::Park { "park" } else { "wake" };
    let mut command = Command::new(program);
    command.args(["checkpoint", word]).args(&pids).stdin(Stdio::null()).stdout(Stdio::null()).kill_on_drop(true);
    let done = command.output().await.map_err(|error| format!("cannot start {}: {error}", program.display()))?;
    if done.status.success() {
        return Ok(());
    }
    let says = String::from_utf8_lossy(&done.stderr);
    let says = says.trim();
    Err(if says.is_empty() { format!("the driver's checkpoint {}", done.status) } else { says.to_owned() })
}

/// What `roundhouse checkpoint` does: the processes among `pids` that use a GPU go the given way, all of them or none. The
/// error is for a person.
pub fn run(way: Way, pids: &[i32]) -> Result<(), String> {
    // Not to go on without the server.
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).map_err(|error| format!("cannot tie it to the server: {error}"))?;
    let driver = Libcuda::load()?;
    match way {
        Way::Park => park(&driver, pids),
        Way::Wake => wake(&driver, pids),
    }
}

fn park(driver: &dyn Driver, pids: &[i32]) -> Result<(), String> {
    let mut users = Vec::new();
    let mut refused = String::new();
    for &pid in pids {
        match driver.state(pid) {
            Ok(State::Running) => users.push(pid),
            Ok(state) => return Err(format!("process {pid} cannot be checkpointed: it is {state:?}")),
            Err(error) => refused = error,
        }
    }
    if users.is_empty() {
        return Err(format!("none of its processes can be checkpointed (the driver says {refused})"));
    }
    let parked = all(driver, Step::Lock, &users).and_then(|()| all(driver, Step::Checkpoint, &users));
    parked.map_err(|error| match wake(driver, &users) {
        Ok(()) => error,
        Err(stuck) => format!("{error}; and it cannot be undone: {stuck}"),
    })
}

/// From wherever they are; a process that runs is left alone.
fn wake(driver: &dyn Driver, pids: &[i32]) -> Result<(), String> {
    let state = |pid: i32| driver.state(pid).ok();
    let of = |wanted: State| pids.iter().copied().filter(|&pid| state(pid) == Some(wanted)).collect::<Vec<_>>();
    all(driver, Step::Restore, &of(State::Checkpointed))?;
    all(driver, Step::Unlock, &of(State::Locked))?;
    match of(State::Failed).first() {
        Some(pid) => Err(format!("the driver says that process {pid} is lost")),
        None => Ok(()),
    }
}

/// The step for each of them at the same time: an engine's processes wait for each other. The first error counts.
fn all(driver: &dyn Driver, step: Step, pids: &[i32]) -> Result<(), String> {
    std::thread::scope(|scope| {
        let running: Vec<_> = pids.iter().map(|&pid| (pid, scope.spawn(move || driver.step(step, pid)))).collect();
        let mut outcome = Ok(());
        for (pid, thread) in running {
            let done = thread.join().unwrap_or_else(|_| Err("a panic".to_owned()));
            let done = done.map_err(|error| format!("{step:?} of process {pid} failed: {error}"));
            outcome = outcome.and(done);
        }
        outcome
    })
}

/// `CUcheckpointLockArgs` of cuda.h.
#[repr(C)]
struct LockArgs {
    timeout_ms: c_uint,
    reserved: [c_uint; 15],
}

type GetState = unsafe extern "C" fn(c_int, *mut c_int) -> c_int;
type Act = unsafe extern "C" fn(c_int, *mut c_void) -> c_int;
type GetErrorName = unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int;

/// The driver's library.
struct Libcuda {
    get_state: GetState,
    lock: Act,
    checkpoint: Act,
    restore: Act,
    unlock: Act,
    error_name: GetErrorName,
    /// Owns the code behind the pointers above.
    _library: libloading::Library,
}

#[expect(unsafe_code, reason = "the driver has no safe face, and no crate binds these calls")]
impl Libcuda {
    fn load() -> Result<Self, String> {
        let name = std::env::var(LIBRARY).unwrap_or_else(|_| "libcuda.so.1".to_owned());
        let too_old =
            |error| format!("the driver cannot checkpoint processes, which needs version 570 or newer ({error})");
        // SAFETY: initializers of NVIDIA's driver run, as in every CUDA program.
        let library = unsafe { libloading::Library::new(&name) }.map_err(|e| format!("cannot load {name}: {e}"))?;
        // SAFETY: the types are those of cuda.h, and the library is kept as long as the pointers.
        unsafe {
            let act = |name: &[u8]| library.get::<Act>(name).map(|symbol| *symbol).map_err(too_old);
            Ok(Self {
                get_state: *library.get::<GetState>(b"cuCheckpointProcessGetState\0").map_err(too_old)?,
                lock: act(b"cuCheckpointProcessLock\0")?,
                checkpoint: act(b"cuCheckpointProcessCheckpoint\0")?,
                restore: act(b"cuCheckpointProcessRestore\0")?,
                unlock: act(b"cuCheckpointProcessUnlock\0")?,
                error_name: *library.get::<GetErrorName>(b"cuGetErrorName\0").map_err(too_old)?,
                _library: library,
            })
        }
    }

    fn result(&self, code: c_int) -> Result<(), String> {
        if code == 0 {
            return Ok(());
        }
        let mut name: *const c_char = std::ptr::null();
        // SAFETY: the driver sets `name` to a text of its own that lives as long as the library, or to null.
        let known = unsafe { (self.error_name)(code, &raw mut name) == 0 && !name.is_null() };
        // SAFETY: not null, and ends with a 0 byte.
        Err(if known {
            unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
        } else {
            format!("error {code}")
        })
    }
}

#[expect(unsafe_code, reason = "calls into the driver")]
impl Driver for Libcuda {
    fn state(&self, pid: i32) -> Result<State, String> {
        let mut state: c_int = -1;
        // SAFETY: writes one integer.
        self.result(unsafe { (self.get_state)(pid, &raw mut state) })?;
        match state {
            0 => Ok(State::Running),
            1 => Ok(State::Locked),
            2 => Ok(State::Checkpointed),
            _ => Ok(State::Failed),
        }
    }

    fn step(&self, step: Step, pid: i32) -> Result<(), String> {
        let mut lock = LockArgs { timeout_ms: LOCK_TIMEOUT_MS, reserved: [0; 15] };
        let none = std::ptr::null_mut();
        // SAFETY: the arguments are optional but for the lock's, which outlives the call.
        let code = unsafe {
            match step {
                Step::Lock => (self.lock)(pid, (&raw mut lock).cast()),
                Step::Checkpoint => (self.checkpoint)(pid, none),
                Step::Restore => (self.restore)(pid, none),
                Step::Unlock => (self.unlock)(pid, none),
            }
        };
        self.result(code)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Mutex;

    use super::*;

    /// Processes by their states; the steps that fail.
    struct Play {
        states: Mutex<BTreeMap<i32, State>>,
        fails: Vec<(Step, i32)>,
    }

    impl Play {
        fn new(fails: &[(Step, i32)]) -> Self {
            let states = BTreeMap::from([(1, State::Running), (2, State::Running)]);
            Self { states: Mutex::new(states), fails: fails.to_vec() }
        }

        fn states(&self) -> Vec<State> {
            self.states.lock().unwrap().values().copied().collect()
        }
    }

    impl Driver for Play {
        fn state(&self, pid: i32) -> Result<State, String> {
            self.states.lock().unwrap().get(&pid).copied().ok_or_else(|| "CUDA_ERROR_INVALID_VALUE".to_owned())
        }

        fn step(&self, step: Step, pid: i32) -> Result<(), String> {
            if self.fails.contains(&(step, pid)) {
                return Err("CUDA_ERROR_NOT_SUPPORTED".to_owned());
            }
            let (from, to) = match step {
                Step::Lock => (State::Running, State::Locked),
                Step::Checkpoint => (State::Locked, State::Checkpointed),
                Step::Restore => (State::Checkpointed, State::Locked),
                Step::Unlock => (State::Locked, State::Running),
            };
            let known = self.states.lock().unwrap().insert(pid, to);
            if known == Some(from) { Ok(()) } else { Err("CUDA_ERROR_ILLEGAL_STATE".to_owned()) }
        }
    }

    #[test]
    fn those_that_use_a_gpu_go_and_come_back_together() {
        let play = Play::new(&[]);
        park(&play, &[1, 2, 3]).unwrap();
        assert_eq!(play.states(), [State::Checkpointed; 2], "3 uses none");
        wake(&play, &[1, 2, 3]).unwrap();
        assert_eq!(play.states(), [State::Running; 2]);
        wake(&play, &[1, 2]).unwrap();
        let error = park(&play, &[3]).unwrap_err();
        assert!(error.contains("none of its processes") && error.contains("CUDA_ERROR_INVALID_VALUE"), "{error}");
    }

    #[test]
    fn a_step_that_fails_is_undone_for_all() {
        for step in [Step::Lock, Step::Checkpoint] {
            let play = Play::new(&[(step, 2)]);
            let error = park(&play, &[1, 2]).unwrap_err();
            assert!(error.contains("process 2") && error.contains("CUDA_ERROR_NOT_SUPPORTED"), "{error}");
            assert_eq!(play.states(), [State::Running; 2], "{step:?}");
        }
        let play = Play::new(&[(Step::Checkpoint, 2), (Step::Restore, 1)]);
        let error = park(&play, &[1, 2]).unwrap_err();
        assert!(error.contains("cannot be undone: Restore of process 1"), "{error}");
    }

    #[test]
    fn arguments_are_as_large_as_the_driver_expects() {
        assert_eq!(size_of::<LockArgs>(), 64);
    }
}
