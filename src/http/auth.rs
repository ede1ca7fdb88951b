//! Who is asking: API keys as bearer tokens, and signatures that open one artifact without a key.

use std::fmt;
use std::io::{IsTerminal as _, Write as _};
use std::path::Path;
use std::sync::Arc;

use axum::http::{HeaderMap, header};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
use hmac::{Hmac, Mac};
use sha2::{Digest, Sha256};

use crate::domain::{ErrorCode, Job};
use crate::http::error::ApiError;

/// The name whose key may do everything that is done by hand, and sees what concerns all.
pub const ADMIN: &str = "admin";
/// Whose jobs they are without keys.
pub const DEFAULT_TENANT: &str = "default";
const KEY_BYTES_MIN: usize = 8;
const NAME_BYTES_MAX: usize = 64;

/// Why keys could not be read; never shows a key.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// The text is not `name:key,...`.
    #[error("entry {entry}: {message}")]
    Malformed {
        /// 1-based.
        entry: usize,
        /// What is wrong and what to do.
        message: String,
    },
    /// The key file.
    #[error("{path}: {message}")]
    File {
        /// Which.
        path: String,
        /// What is wrong and what to do.
        message: String,
    },
}

struct Key {
    tenant: Arc<str>,
    /// SHA-256 of the key: equal lengths to compare, and nothing to leak.
    hash: [u8; 32],
}

/// The keys that open this server; none: it is open to whoever reaches it.
#[derive(Default)]
pub struct ApiKeys {
    keys: Vec<Key>,
}

impl fmt::Debug for ApiKeys {
    /// Shows names, never keys.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.keys.iter().map(|key| &key.tenant)).finish()
    }
}

impl ApiKeys {
    /// No keys: everybody who reaches the server is `default`.
    pub fn none() -> Self {
        Self::default()
    }

    /// Reads `name:key,name:key`. Names are tenants: unique, 1 to 64 of `A-Z a-z 0-9 _ . -`; keys have at least 8
    /// printable characters and no comma.
    pub fn parse(text: &str) -> Result<Self, KeysError> {
        let mut keys: Vec<Key> = Vec::new();
        for (index, part) in text.split(',').enumerate() {
            let malformed = |message: String| KeysError::Malformed { entry: index + 1, message };
            let (name, key) =
                part.trim().split_once(':').ok_or_else(|| malformed("expected `name:key`, found no colon".into()))?;
            let (name, key) = (name.trim(), key.trim());
            let is_name = !name.is_empty()
                && name.len() <= NAME_BYTES_MAX
                && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b));
            if !is_name {
                return Err(malformed("a name has 1 to 64 letters, digits, `_`, `.` or `-`".into()));
            }
            if key.len() < KEY_BYTES_MIN || !key.bytes().all(|b| b.is_ascii_graphic()) {
                return Err(malformed(format!(
                    "the key of `{name}` needs at least {KEY_BYTES_MIN} printable characters without spaces"
                )));
            }
            if keys.iter().any(|other| &*other.tenant == name) {
                return Err(malformed(format!("the name `{name}` is there twice")));
            }
            let key = Key { tenant: name.into(), hash: hash(key) };
            if keys.iter().any(|other| other.hash == key.hash) {
                return Err(malformed(format!("the key of `{name}` is another name's, too")));
            }
            keys.push(key);
        }
        Ok(Self { keys })
    }

    /// The key kept in the file `path`, tenant `default`. If there is none yet, makes one, stores it readable by its
    /// owner only, and shows it once on stderr if that is a terminal; else the log names the file.
    pub fn generated(path: &Path) -> Result<Self, KeysError> {
        let failed = |message: String| KeysError::File { path: path.display().to_string(), message };
        let key = match std::fs::read_to_string(path) {
            Ok(text) => text.trim().to_owned(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let key = make_key(path).map_err(|error| failed(format!("cannot make a key: {error}")))?;
                show_once(&key, path);
                key
            }
            Err(error) => return Err(failed(error.to_string())),
        };
        if key.len() < KEY_BYTES_MIN {
            return Err(failed("holds no key; delete it and a new one is made".into()));
        }
        Ok(Self { keys: vec![Key { tenant: DEFAULT_TENANT.into(), hash: hash(&key) }] })
    }

    /// Whether callers need no key.
    pub fn is_open(&self) -> bool {
        self.keys.is_empty()
    }

    /// Whose key the request carries. Takes the same time whichever key it is.
    pub fn check(&self, headers: &HeaderMap) -> Result<Caller, ApiError> {
        if self.is_open() {
            return Ok(Caller::of(DEFAULT_TENANT.into(), true));
        }
        let refused = |message: &str| ApiError::new(ErrorCode::InvalidApiKey, message);
        let header = headers
            .get(header::AUTHORIZATION)
            .ok_or_else(|| refused("an API key is needed: send `Authorization: Bearer KEY`"))?;
        let key = header
            .to_str()
            .ok()
            .and_then(|text| text.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .ok_or_else(|| refused("the Authorization header must be `Bearer KEY`"))?;
        let given = hash(key.1.trim());
        let mut found = None;
        for key in &self.keys {
            if equal(&key.hash, &given) {
                found = Some(key.tenant.clone());
            }
        }
        // With one key, it is the owner's.
        let is_admin = |tenant: &str| tenant == ADMIN || self.keys.len() == 1;
        found.map(|tenant| Caller::of(tenant.clone(), is_admin(&tenant))).ok_or_else(|| refused("the API key is wrong"))
    }
}

fn hash(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

fn equal(a: &[u8; 32], b: &[u8; 32]) -> bool {
    std::hint::black_box(a.iter().zip(b).fold(0, |differing, (a, b)| differing | (a ^ b))) == 0
}

fn make_key(path: &Path) -> std::io::Result<String> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut random = [0_u8; 24];
    getrandom::fill(&mut random).map_err(std::io::Error::other)?;
    let key = format!("rh-{}", BASE64.encode(random));
    let mut file = std::fs::OpenOptions::new().create_new(true).write(true).mode(0o600).open(path)?;
    writeln!(file, "{key}")?;
    file.sync_all()?;
    Ok(key)
}

fn show_once(key: &str, path: &Path) {
    if !std::io::stderr().is_terminal() {
        // What is no terminal is a log, and keys have no place in one.
        tracing::warn!("this server can be reached from other machines: an API key was made, see {}", path.display());
        return;
    }
    let text = format!(
        "This server can be reached from other machines, so it needs an API key. One was made, and is shown only now:\n\n    \
         {key}\n\nSend it as `Authorization: Bearer KEY` (OPENAI_API_KEY of the SDKs). It is kept in {}.\n",
        path.display()
    );
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// Who is asking.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The key's name.
    pub tenant: Arc<str>,
    /// May do what concerns all tenants: the key named `admin`, the only key, or, without keys, anybody.
    pub admin: bool,
    /// Let in by a signature: for the one artifact that it names, whoever owns it.
    pub signed: bool,
}

impl Caller {
    fn of(tenant: Arc<str>, admin: bool) -> Self {
        Self { tenant, admin, signed: false }
    }

    /// Somebody with a valid signature and no key.
    pub fn signed() -> Self {
        Self { tenant: Arc::from(""), admin: false, signed: true }
    }

    /// Refuses whoever may not do what concerns all tenants.
    pub fn may_operate(&self) -> Result<(), ApiError> {
        if self.admin {
            return Ok(());
        }
        let message =
            "this concerns all tenants, so it takes the key named `admin` (ROUNDHOUSE_API_KEYS=admin:KEY,...)";
        Err(ApiError::new(ErrorCode::Forbidden, message))
    }

    /// Another tenant's jobs do not exist for this caller.
    pub fn may_see(&self, job: &Job) -> Result<(), ApiError> {
        if self.signed || *job.tenant == *self.tenant { Ok(()) } else { Err(ApiError::not_found("the job")) }
    }
}

/// Signs paths of artifacts. A signature opens one path until a time.
#[derive(Clone)]
pub struct Signer {
    secret: [u8; 32],
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Signer")
    }
}

impl Signer {
    /// Signs with `secret`.
    pub fn new(secret: [u8; 32]) -> Self {
        Self { secret }
    }

    /// `path?exp=…&sig=…`; `expires_s`: seconds since the epoch.
    pub fn sign(&self, path: &str, expires_s: i64) -> String {
        let signature = BASE64.encode(self.mac(path, expires_s).finalize().into_bytes());
        format!("{path}?exp={expires_s}&sig={signature}")
    }

    /// Whether `query` holds a valid signature of `path`. `None`: it holds none.
    pub fn check(&self, path: &str, query: &str, now_s: i64) -> Option<Result<(), ApiError>> {
        let field = |name: &str| {
            query.split('&').find_map(|pair| pair.strip_prefix(name).and_then(|rest| rest.strip_prefix('=')))
        };
        let signature = field("sig")?;
        let refused = || {
            ApiError::new(ErrorCode::Forbidden, "the URL's signature is wrong or past its time; ask for the job again")
        };
        let valid = || {
            let expires_s: i64 = field("exp")?.parse().ok()?;
            let signature = BASE64.decode(signature).ok()?;
            self.mac(path, expires_s).verify_slice(&signature).ok()?;
            (now_s < expires_s).then_some(())
        };
        Some(valid().ok_or_else(refused))
    }

    fn mac(&self, path: &str, expires_s: i64) -> Hmac<Sha256> {
        // Any length of key is allowed, so this cannot fail.
        #[expect(clippy::expect_used, reason = "HMAC takes keys of any length")]
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.secret).expect("any key length");
        mac.update(path.as_bytes());
        mac.update(b"\n");
        mac.update(expires_s.to_string().as_bytes());
        mac
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bearer(key: &str) -> HeaderMap {
        HeaderMap::from_iter([(header::AUTHORIZATION, format!("Bearer {key}").parse().unwrap())])
    }

    #[test]
    fn a_key_names_its_tenant() {
        let keys = ApiKeys::parse("alice:secret-one, bob:secret-two").unwrap();
        assert_eq!(&*keys.check(&bearer("secret-two")).unwrap().tenant, "bob");
        assert_eq!(keys.check(&bearer("secret-three")).unwrap_err().code, ErrorCode::InvalidApiKey);
        assert_eq!(keys.check(&HeaderMap::new()).unwrap_err().code, ErrorCode::InvalidApiKey);
        let basic = HeaderMap::from_iter([(header::AUTHORIZATION, "Basic secret-two".parse().unwrap())]);
        assert!(keys.check(&basic).is_err());
        assert_eq!(&*ApiKeys::none().check(&HeaderMap::new()).unwrap().tenant, "default");
    }

    #[test]
    fn the_key_named_admin_the_only_key_and_no_keys_operate() {
        let several = ApiKeys::parse("alice:secret-one,admin:secret-two").unwrap();
        assert_eq!(several.check(&bearer("secret-one")).unwrap().may_operate().unwrap_err().code, ErrorCode::Forbidden);
        assert!(several.check(&bearer("secret-two")).unwrap().may_operate().is_ok());
        let one = ApiKeys::parse("alice:secret-one").unwrap();
        assert!(one.check(&bearer("secret-one")).unwrap().may_operate().is_ok());
        assert!(ApiKeys::none().check(&HeaderMap::new()).unwrap().may_operate().is_ok());
        assert!(Caller::signed().may_operate().is_err());
    }

    #[test]
    fn keys_are_never_shown() {
        let keys = ApiKeys::parse("alice:secret-one").unwrap();
        assert_eq!(format!("{keys:?}"), "[\"alice\"]");
        for bad in
            ["secret-one", "alice:short", ":secret-one", "a b:secret-one", "alice:secret-one,alice:secret-two", ""]
        {
            let error = ApiKeys::parse(bad).unwrap_err().to_string();
            assert!(error.starts_with("entry ") && !error.contains("secret"), "{bad}: {error}");
        }
        assert!(ApiKeys::parse("a:secret-one,b:secret-one").is_err(), "one key, two tenants");
    }

    #[test]
    fn a_generated_key_is_made_once_and_private() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api_key");
        let made = ApiKeys::generated(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let key = std::fs::read_to_string(&path).unwrap();
        assert!(made.check(&bearer(key.trim())).is_ok());
        assert!(ApiKeys::generated(&path).unwrap().check(&bearer(key.trim())).is_ok());
        std::fs::write(&path, "\n").unwrap();
        assert!(ApiKeys::generated(&path).is_err());
    }

    #[test]
    fn a_signature_opens_one_path_until_its_time() {
        let signer = Signer::new([7; 32]);
        let signed = signer.sign("/v1/jobs/job_1/artifacts/art_0", 1_000);
        let (path, query) = signed.split_once('?').unwrap();
        assert_eq!(signer.check(path, query, 999), Some(Ok(())));
        assert_eq!(signer.check(path, query, 1_000).unwrap().unwrap_err().code, ErrorCode::Forbidden);
        assert!(signer.check("/v1/jobs/job_1/artifacts/art_1", query, 999).unwrap().is_err());
        assert!(signer.check(path, &query.replace("exp=1000", "exp=2000"), 999).unwrap().is_err());
        assert!(signer.check(path, "exp=1000&sig=x", 999).unwrap().is_err());
        assert!(Signer::new([8; 32]).check(path, query, 999).unwrap().is_err());
        assert_eq!(signer.check(path, "download=1", 999), None);
    }
}
