//! What an operator may tell the scheduler by hand, and what of it holds until somebody says otherwise.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What is done by hand to the queue or to a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Control {
    /// No waiting job starts; running ones go on, and new ones are accepted. `None`: of all models.
    Pause(Option<String>),
    /// Undoes `Pause` and `Drain`; without a model, those of single models, too.
    Resume(Option<String>),
    /// New jobs are refused; those that wait and run are finished. Ends a pause.
    Drain(Option<String>),
    /// The model's turn has come, whether jobs of it wait or not.
    Load(String),
    /// The model's workers stop when their running jobs have ended; waiting jobs bring it back when its turn comes.
    Unload(String),
    /// The model is never displaced by another one.
    Pin(String),
    /// It may be displaced, also if `models.yaml` says `pin`.
    Unpin(String),
}

impl Control {
    /// Its word.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Pause(_) => "pause",
            Self::Resume(_) => "resume",
            Self::Drain(_) => "drain",
            Self::Load(_) => "load",
            Self::Unload(_) => "unload",
            Self::Pin(_) => "pin",
            Self::Unpin(_) => "unpin",
        }
    }
}

/// What holds for the whole queue or for one model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Held {
    /// No waiting job starts.
    pub paused: bool,
    /// New jobs are refused.
    pub draining: bool,
    /// Says otherwise than `pin` of the model's entry; `None`: as the entry says.
    pub pin: Option<bool>,
}

/// What was said by hand and holds until somebody says otherwise, restarts included.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Controls {
    /// For all models.
    pub all: Held,
    /// By entry name; what is not there holds for none.
    pub models: BTreeMap<String, Held>,
}

/// The command that ends a pause or a drain of a model; `with_all`: all models are held so, and so is this one.
pub fn resume_command(model: &str, with_all: bool) -> String {
    let own = if with_all { String::new() } else { format!(" --model {model}") };
    format!("roundhouse queue resume{own}")
}

impl Controls {
    /// What holds for this model, what holds for all counted in.
    pub fn of(&self, model: &str) -> Held {
        let own = self.models.get(model).copied().unwrap_or_default();
        Held { paused: own.paused || self.all.paused, draining: own.draining || self.all.draining, pin: own.pin }
    }

    /// Takes in what lasts of `control`; `Load` and `Unload` do not.
    pub fn take(&mut self, control: &Control) {
        match control {
            Control::Pause(scope) => self.change(scope.as_deref(), |held| held.paused = true),
            Control::Drain(scope) => self.change(scope.as_deref(), |held| held.draining = true),
            Control::Pin(model) => self.change(Some(model), |held| held.pin = Some(true)),
            Control::Unpin(model) => self.change(Some(model), |held| held.pin = Some(false)),
            Control::Resume(_) | Control::Load(_) | Control::Unload(_) => {}
        }
        match control {
            Control::Resume(Some(model)) => {
                self.change(Some(model), |held| *held = Held { pin: held.pin, ..Held::default() })
            }
            Control::Resume(None) => {
                self.all = Held::default();
                self.models.values_mut().for_each(|held| *held = Held { pin: held.pin, ..Held::default() });
            }
            // What is to be finished must be able to start.
            Control::Drain(Some(model)) => self.change(Some(model), |held| held.paused = false),
            Control::Drain(None) => {
                self.all.paused = false;
                self.models.values_mut().for_each(|held| held.paused = false);
            }
            _ => {}
        }
        self.models.retain(|_, held| *held != Held::default());
    }

    fn change(&mut self, model: Option<&str>, change: impl FnOnce(&mut Held)) {
        match model {
            Some(model) => change(self.models.entry(model.to_owned()).or_default()),
            None => change(&mut self.all),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_holds_for_all_holds_for_each_and_resume_undoes_both() {
        let mut controls = Controls::default();
        controls.take(&Control::Pause(None));
        controls.take(&Control::Pause(Some("a".into())));
        controls.take(&Control::Pin("a".into()));
        assert!(controls.of("a").paused && controls.of("b").paused && !controls.of("b").draining);
        controls.take(&Control::Resume(Some("b".into())));
        assert!(controls.of("b").paused, "the whole queue is");
        controls.take(&Control::Drain(None));
        assert!(!controls.of("a").paused && controls.of("a").draining && controls.of("b").draining);
        controls.take(&Control::Resume(None));
        assert_eq!(controls.of("a"), Held { pin: Some(true), ..Held::default() }, "a pin is another matter");
        assert_eq!(controls.models.len(), 1, "nothing is kept of those for whom nothing holds");
    }

    #[test]
    fn what_holds_is_read_back_as_it_was_written() {
        let mut controls = Controls::default();
        controls.take(&Control::Drain(Some("a".into())));
        controls.take(&Control::Unpin("b".into()));
        let text = serde_json::to_string(&controls).unwrap();
        assert_eq!(serde_json::from_str::<Controls>(&text).unwrap(), controls);
        assert_eq!(serde_json::from_str::<Controls>("{}").unwrap(), Controls::default());
    }
}
