//! Which variables of the server's environment a worker never inherits. By name only: no value is looked at. What a worker
//! does need goes into its entry's `env`.

/// Beginnings of names: our own settings, API keys of our clients among them, and a cloud's.
const BEGINNINGS: [&str; 2] = ["ROUNDHOUSE_", "AWS_"];
/// Ends of names, or whole names without the underscore: `HF_TOKEN`, `TOKEN`, `RUNPOD_API_KEY`, `OPENAI_KEY`, `GITHUB_PAT`,
/// `REDISCLI_AUTH`.
const ENDS: [&str; 12] =
    ["_TOKEN", "_TOKENS", "_KEY", "_KEYS", "_APIKEY", "_APIKEYS", "_PASS", "_PWD", "_PAT", "_DSN", "_AUTH", "_CREDS"];
/// Parts of names, wherever they stand: `DOCKER_AUTH_CONFIG`, and `SSH_AUTH_SOCK`, by which one signs with the keys of whoever
/// started the server.
const PARTS: [&str; 6] = ["SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIAL", "_AUTH_"];
/// Words of a name that ends in `_URL` or `_URI`: a password is in it. `REDIS_URL`, `MY_DATABASE_URL`, `MONGO_URI`.
const STORES: [&str; 12] = [
    "DATABASE",
    "DB",
    "REDIS",
    "MONGO",
    "MONGODB",
    "POSTGRES",
    "POSTGRESQL",
    "MYSQL",
    "MARIADB",
    "AMQP",
    "RABBITMQ",
    "BROKER",
];
/// The folder that a shell is in.
const FOLDER: &str = "PWD";

/// Whether a variable looks like a credential.
pub(super) fn is_secret(name: &str) -> bool {
    let name = name.to_ascii_uppercase();
    let address = name.strip_suffix("_URL").or_else(|| name.strip_suffix("_URI"));
    BEGINNINGS.iter().any(|begin| name.starts_with(begin))
        || (name != FOLDER && ENDS.iter().any(|end| name.ends_with(end) || name == end[1..]))
        || PARTS.iter().any(|part| name.contains(part))
        || address.is_some_and(|rest| rest.split('_').any(|word| STORES.contains(&word)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_looks_like_a_credential_is_one() {
        let secrets = "HF_TOKEN HF_API_TOKEN HUGGING_FACE_HUB_TOKEN HUGGINGFACEHUB_API_TOKEN RUNPOD_API_KEY OPENAI_API_KEY \
                       VLLM_API_KEY ROUNDHOUSE_API_KEYS ROUNDHOUSE_ANYTHING AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY \
                       AWS_SESSION_TOKEN AZURE_STORAGE_ACCOUNT_KEY GOOGLE_APPLICATION_CREDENTIALS GITHUB_TOKEN TOKEN API_KEY \
                       PGPASSWORD DB_PASSWORD MY_SECRET_THING CLIENT_SECRET SSH_AUTH_SOCK DATABASE_URL SENTRY_DSN github_token \
                       OPENAI_KEY ENCRYPTION_KEY SIGNING_KEY GITHUB_PAT MYSQL_PWD DB_PASS MY_DATABASE_URL REDIS_URL MONGO_URI \
                       CELERY_BROKER_URL OPENAI_API_KEYS API_KEYS HF_TOKENS TOKENS VENDOR_APIKEYS REDISCLI_AUTH \
                       DOCKER_AUTH_CONFIG NPM_CREDS auth";
        for name in secrets.split_whitespace() {
            assert!(is_secret(name), "{name}");
        }
        let plain = "PATH HOME PWD OLDPWD LANG HF_HOME HF_HUB_CACHE HF_ENDPOINT TOKENIZERS_PARALLELISM CUDA_VISIBLE_DEVICES \
                     LD_LIBRARY_PATH PYTORCH_CUDA_ALLOC_CONF VLLM_CACHE_ROOT KEYBOARD RUNPOD_POD_ID HTTPS_PROXY \
                     XKB_KEYMAP COMPAT BASE_URL HF_HUB_URL DBUS_SESSION_BUS_ADDRESS PATH_PATTERN XAUTHORITY \
                     AUTHOR_NAME KEYSTONE MAX_TOKENS_PER_STEP";
        for name in plain.split_whitespace() {
            assert!(!is_secret(name), "{name}");
        }
    }
}
