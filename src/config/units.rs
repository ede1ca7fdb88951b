//! How people write durations, sizes, shares and words in `models.yaml`.

use std::fmt;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Deserialize, Deserializer, SeqAccess, Visitor};

use crate::policy::knobs::ParkRam;

/// A duration: a bare number is seconds, else `500ms`, `90s`, `15m`, `2h`, `7d`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Period(pub(super) Duration);

/// A size in bytes: a bare number, else `18GiB`, `18GB`, `512MiB`, `2TiB` and so on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Size(pub(super) u64);

/// A share: `0.5` or `50%`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Share(pub(super) f64);

/// Room in host memory: a size, or a share of all of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Room(pub(super) ParkRam);

/// A word of a command line or a value of the environment: text, number or boolean, as it is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Word(pub(super) String);

/// A command line: one string, split as a shell would, or a list of words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Command(pub(super) Vec<String>);

/// Longest duration that makes sense here; a longer one is a slip of units.
const PERIOD_MAX_S: f64 = 366.0 * 24.0 * 3600.0;

pub(super) fn period(text: &str) -> Result<Duration, String> {
    let help = || format!("`{text}` is no duration; write seconds (90) or 500ms, 90s, 15m, 2h, 7d; at most 366d");
    let (number, unit) = number_and_unit(text).ok_or_else(help)?;
    let factor = match unit {
        "" | "s" => 1.0,
        "ms" => 0.001,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        "d" => 86400.0,
        _ => return Err(help()),
    };
    seconds(number * factor).ok_or_else(help)
}

/// A duration as a person would write it: `168h`, `90m`, `5s`.
pub(super) fn shown_period(period: Duration) -> String {
    let (ms, s) = (period.as_millis(), period.as_secs());
    match s {
        0 => format!("{ms}ms"),
        _ if ms % 1_000 != 0 => format!("{}s", period.as_secs_f64()),
        _ if s % 3_600 == 0 => format!("{}h", s / 3_600),
        _ if s % 60 == 0 => format!("{}m", s / 60),
        _ => format!("{s}s"),
    }
}

fn seconds(seconds: f64) -> Option<Duration> {
    (0.0..=PERIOD_MAX_S).contains(&seconds).then(|| Duration::from_millis((seconds * 1000.0).round() as u64))
}

fn size(text: &str) -> Result<u64, String> {
    let help = || {
        format!(
            "`{text}` is no size; write bytes, or a number with KiB, MiB, GiB, TiB (powers of 1024) or KB, MB, GB, TB; less than 9000TB"
        )
    };
    let (number, unit) = number_and_unit(text).ok_or_else(help)?;
    let factor: u64 = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err(help()),
    };
    let bytes = number * factor as f64;
    if (0.0..9e15).contains(&bytes) { Ok(bytes.round() as u64) } else { Err(help()) }
}

fn share(text: &str) -> Result<f64, String> {
    let help = || format!("`{text}` is no share; write 0.5 or 50%");
    let (number, unit) = number_and_unit(text).ok_or_else(help)?;
    match unit {
        "" => Ok(number),
        "%" => Ok(number / 100.0),
        _ => Err(help()),
    }
}

fn room(text: &str) -> Result<ParkRam, String> {
    let is_share = number_and_unit(text)
        .is_some_and(|(number, unit)| unit == "%" || (unit.is_empty() && 0.0 < number && number < 1.0));
    match is_share {
        true => share(text).map(ParkRam::Share),
        false => size(text).map(ParkRam::Bytes),
    }
}

/// A share that is neither nothing nor all.
pub(super) fn share_within(text: &str) -> Result<f64, String> {
    match share(text)? {
        within if within > 0.0 && within < 1.0 => Ok(within),
        _ => Err("must lie between 0 and 1, as 0.5 or 50% do".to_owned()),
    }
}

/// `18 GiB` -> (18.0, "GiB").
fn number_and_unit(text: &str) -> Option<(f64, &str)> {
    let text = text.trim();
    let end = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let number = text[..end].parse().ok()?;
    Some((number, text[end..].trim()))
}

/// A visitor that turns any scalar into its text and hands that to a reader.
struct Reader<T> {
    expecting: &'static str,
    read: fn(&str) -> Result<T, String>,
}

impl<T> Visitor<'_> for Reader<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expecting)
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<T, E> {
        (self.read)(&value.to_string()).map_err(E::custom)
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<T, E> {
        (self.read)(&value.to_string()).map_err(E::custom)
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<T, E> {
        (self.read)(&value.to_string()).map_err(E::custom)
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<T, E> {
        (self.read)(value).map_err(E::custom)
    }
}

macro_rules! scalar {
    ($name:ident, $read:path, $expecting:literal, $schema:tt) => {
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let reader = Reader { expecting: $expecting, read: $read };
                deserializer.deserialize_any(reader).map(Self)
            }
        }

        impl JsonSchema for $name {
            fn inline_schema() -> bool {
                true
            }

            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!($schema)
            }
        }
    };
}

scalar!(Period, period, "a duration: seconds (90), or 500ms, 90s, 15m, 2h, 7d", {
    "type": ["number", "string"], "minimum": 0, "pattern": r"^[0-9.]+ *(ms|s|m|min|h|d)?$"
});
scalar!(Size, size, "a size: bytes, or a number with KiB, MiB, GiB, TiB, KB, MB, GB or TB", {
    "type": ["integer", "string"], "minimum": 0, "pattern": r"^[0-9.]+ *([kKmMgGtT][iI]?)?[bB]?$"
});
scalar!(Share, share, "a share: 0.5 or 50%", {
    "type": ["number", "string"], "exclusiveMinimum": 0, "exclusiveMaximum": 1, "pattern": r"^[0-9.]+ *%?$"
});

scalar!(Room, room, "a size (64GiB), or a share of the memory (60%)", {
    "type": ["number", "string"], "minimum": 0, "pattern": r"^[0-9.]+ *(%|([kKmMgGtT][iI]?)?[bB]?)$"
});

impl<'de> Deserialize<'de> for Word {
    /// Asks for a string, so that `1.10` stays `1.10`.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self)
    }
}

impl JsonSchema for Word {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Word".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": ["string", "number", "boolean"] })
    }
}

impl<'de> Deserialize<'de> for Command {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Words;
        impl<'de> Visitor<'de> for Words {
            type Value = Command;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a command: one string, or a list of words")
            }

            fn visit_str<E: de::Error>(self, line: &str) -> Result<Command, E> {
                let words = shlex::split(line)
                    .ok_or_else(|| E::custom("the quotes of the command do not close; a list of words needs none"))?;
                Ok(Command(words))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Command, A::Error> {
                let mut words = Vec::new();
                while let Some(Word(word)) = list.next_element()? {
                    words.push(word);
                }
                Ok(Command(words))
            }
        }
        deserializer.deserialize_any(Words)
    }
}

impl JsonSchema for Command {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Command".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "anyOf": [
                { "type": "string" },
                { "type": "array", "items": generator.subschema_for::<Word>(), "minItems": 1 }
            ]
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        assert_eq!(period("90"), Ok(Duration::from_secs(90)));
        assert_eq!(period("0.5"), Ok(Duration::from_millis(500)));
        assert_eq!(period("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(period("15m"), Ok(Duration::from_secs(900)));
        assert_eq!(period("2 h"), Ok(Duration::from_secs(7200)));
        assert_eq!(period("7d"), Ok(Duration::from_secs(604_800)));
        for bad in ["", "s", "-1", "15x", "1m30s", "9999999999h", "1..2"] {
            let error = period(bad).unwrap_err();
            assert!(error.contains("is no duration") && error.contains("7d"), "{bad}: {error}");
        }
        for (ms, shown) in [(500, "500ms"), (1_500, "1.5s"), (90_000, "90s"), (120_000, "2m"), (86_400_000, "24h")] {
            assert_eq!(shown_period(Duration::from_millis(ms)), shown);
        }
    }

    #[test]
    fn sizes() {
        assert_eq!(size("18GiB"), Ok(18 << 30));
        assert_eq!(size("18GB"), Ok(18_000_000_000));
        assert_eq!(size("1.5 gib"), Ok(3 << 29));
        assert_eq!(size("1024"), Ok(1024));
        for bad in ["18G", "-1", "many", "99999TiB"] {
            let error = size(bad).unwrap_err();
            assert!(error.contains("is no size") && error.contains("TiB"), "{bad}: {error}");
        }
        assert_eq!(size("2TiB"), Ok(2 << 40));
    }

    #[test]
    fn shares() {
        assert_eq!(share("50%"), Ok(0.5));
        assert_eq!(share("0.15"), Ok(0.15));
        assert!(share("half").is_err());
    }
}
