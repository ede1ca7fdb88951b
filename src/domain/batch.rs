//! A batch: what a client submitted together.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Key of a batch; shown as `batch_` + 16 hex digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct BatchId(pub i64);

impl fmt::Display for BatchId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "batch_{:016x}", self.0)
    }
}

impl FromStr for BatchId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.strip_prefix("batch_")
            .filter(|hex| hex.len() == 16)
            .and_then(|hex| i64::from_str_radix(hex, 16).ok())
            .map(Self)
            .ok_or_else(|| format!("`{}` is not a batch id", text.chars().take(80).collect::<String>()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn survives_text() {
        assert_eq!(BatchId(77).to_string().parse(), Ok(BatchId(77)));
        assert!("batch_7".parse::<BatchId>().is_err());
    }
}
