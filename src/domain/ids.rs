//! Public job ids: `job_` + a UUIDv7 that carries the row's key, so a look-up needs no index on random ids.
//!
//! Layout of the 128 bits: 48 bits `created_at` in ms, 4 bits version (7), 12 + 22 bits `number`, 2 bits variant (10),
//! 40 bits `tag`. The 34 bits of `number` are split by the variant bits: 12 before them and 22 after. `tag` is random, is
//! stored with the job and compared on each look-up, so ids cannot be guessed from their neighbours.

use std::fmt;
use std::str::FromStr;

use uuid::Uuid;

/// Highest row number an id can carry (34 bits: 17 thousand million jobs).
pub const NUMBER_MAX: i64 = (1 << 34) - 1;
const TAG_MASK: u64 = (1 << 40) - 1;
/// Prefixes under which the same uuid is shown on other faces; any of them resolves.
const PREFIXES: [&str; 6] = ["job_", "chatcmpl-", "cmpl-", "resp_", "batch_req_", "img_"];

/// Identifies one job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId {
    /// Creation time in ms since the epoch (48 bits).
    pub created_ms: i64,
    /// The row's key (34 bits).
    pub number: i64,
    /// Random, compared on look-up (40 bits).
    pub tag: u64,
}

/// Why a text is no job id.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum IdError {
    /// No known prefix or no uuid after it.
    #[error("`{0}` is not a job id: expected `job_` followed by a UUIDv7")]
    Malformed(String),
}

impl JobId {
    /// Makes an id; `tag` is cut to 40 bits.
    pub fn new(created_ms: i64, number: i64, tag: u64) -> Self {
        debug_assert!((0..=NUMBER_MAX).contains(&number));
        Self { created_ms, number, tag: tag & TAG_MASK }
    }

    /// The 128 bits as a UUIDv7.
    pub fn uuid(&self) -> Uuid {
        let number = u128::from(self.number.unsigned_abs() & NUMBER_MAX.unsigned_abs());
        let created = u128::from(self.created_ms.unsigned_abs()) & ((1 << 48) - 1);
        let bits = (created << 80)
            | (0x7 << 76)
            | ((number >> 22) << 64)
            | (0b10 << 62)
            | ((number & ((1 << 22) - 1)) << 40)
            | u128::from(self.tag);
        Uuid::from_u128(bits)
    }

    /// Shows the same id under another face's prefix, for example `chatcmpl-`.
    pub fn with_prefix(&self, prefix: &str) -> String {
        format!("{prefix}{}", self.uuid())
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "job_{}", self.uuid())
    }
}

impl FromStr for JobId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let malformed = || IdError::Malformed(text.chars().take(80).collect());
        let rest = PREFIXES.iter().find_map(|p| text.strip_prefix(p)).ok_or_else(malformed)?;
        let uuid = Uuid::try_parse(rest).map_err(|_| malformed())?;
        if uuid.get_version_num() != 7 {
            return Err(malformed());
        }
        let bits = uuid.as_u128();
        let number = (((bits >> 64) & 0xfff) << 22) | ((bits >> 40) & ((1 << 22) - 1));
        let (Ok(number), Ok(created_ms), Ok(tag)) =
            (i64::try_from(number), i64::try_from(bits >> 80), u64::try_from(bits & u128::from(TAG_MASK)))
        else {
            return Err(malformed());
        };
        Ok(Self { created_ms, number, tag })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn survives_text(created in 0..(1i64 << 48), number in 0..=NUMBER_MAX, tag in 0..=TAG_MASK) {
            let id = JobId::new(created, number, tag);
            prop_assert_eq!(id.uuid().get_version_num(), 7);
            prop_assert_eq!(id.uuid().get_variant(), uuid::Variant::RFC4122);
            prop_assert_eq!(id.to_string().parse::<JobId>(), Ok(id));
            prop_assert_eq!(id.with_prefix("chatcmpl-").parse::<JobId>(), Ok(id));
        }
    }

    #[test]
    fn refuses_other_texts() {
        for text in [
            "",
            "job_",
            "job_123",
            "file-0190163d-8694-739b-aea5-966c26f8ad90",
            "job_a8098c1a-f86e-11da-bd1a-00112444be1e",
        ] {
            assert!(text.parse::<JobId>().is_err(), "{text}");
        }
    }
}
