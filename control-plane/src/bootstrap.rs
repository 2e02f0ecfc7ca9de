//! The first start of an installation, and opening its store at every start.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use scaivault_domain::access::{ROOT_POLICY, Scope};
use scaivault_domain::tenant::TenantId;
use scaivault_domain::time::Clock;
use scaivault_domain::token::token_from_random;
use scaivault_seal::{Keyring, RootKey};
use secrecy::SecretString;

use crate::DEFAULT_TENANT;
use crate::model::{TenantRecord, TokenRecord};
use crate::nodes::create_authority;
use crate::service::tenants::tenant_key;
use crate::service::tokens::{accessor, put_token};
use crate::store::{CommitError, Key, Records, RedbStore, Space, Store, Tx};

const STORE_FILE: &str = "scaivault.redb";

/// The row of the wrapped key ring, the only one whose value is not sealed by it.
fn keyring_key() -> Key {
    Key::installation(Space::Setting, "keyring")
}

/// Opens the store file in `dir`, or makes it.
///
/// # Errors
/// When it cannot be opened; the message says what to do.
pub fn open_store(dir: &Path) -> anyhow::Result<Arc<dyn Store>> {
    Ok(Arc::new(RedbStore::open(&dir.join(STORE_FILE))?))
}

/// Opens the sealed records of an installation.
///
/// # Errors
/// When it was never initialised, or was with another root key.
pub async fn open_records(store: Arc<dyn Store>, root: &RootKey) -> anyhow::Result<Records> {
    let Some(row) = store.get(&keyring_key()).await? else {
        bail!("this installation is not initialised; run `scaivault operator init` with the same --data-dir");
    };
    let keyring =
        Keyring::unwrap(&row.value, root).context("the store cannot be opened with this root key")?;
    Ok(Records::new(store, Arc::new(keyring)))
}

/// Whether [`initialise`] has been here.
///
/// # Errors
/// When the store does not answer.
pub async fn is_initialised(store: &dyn Store) -> anyhow::Result<bool> {
    Ok(store.get(&keyring_key()).await?.is_some())
}

/// Makes an installation: key ring, certificate authority, the tenant `default`, and the first operator token, which is
/// answered and stored nowhere. All in one commit.
///
/// # Errors
/// When there is an installation already.
pub async fn initialise(
    store: Arc<dyn Store>,
    root: &RootKey,
    clock: &dyn Clock,
) -> anyhow::Result<SecretString> {
    let keyring = Keyring::generate();
    let wrapped = keyring.wrap(root);
    let records = Records::new(store.clone(), Arc::new(keyring));
    let tx = Tx::new().expect_absent(keyring_key()).put(keyring_key(), wrapped.into());
    let tx = create_authority(&records, clock, tx)?;

    let now = clock.now();
    let tenant = TenantRecord {
        id: TenantId::parse(DEFAULT_TENANT)?,
        display_name: "the first tenant".into(),
        identities: Vec::new(),
        created: now,
    };
    let at = tenant_key(&tenant.id);
    let tx = tx.put(at.clone(), records.seal(&at, &tenant));

    let mut random = [0; 32];
    getrandom::fill(&mut random)?;
    let token = token_from_random(random);
    let record = TokenRecord {
        tenant: tenant.id.clone(),
        accessor: accessor(),
        subject: "operator".into(),
        scopes: Scope::ALL.to_vec(),
        policies: vec![ROOT_POLICY.into()],
        created: now,
        expires: None,
        lifetime_ms: None,
        parent: None,
    };
    let tx = put_token(&records, tx, &token, &record);
    match store.commit(tx).await {
        Ok(_) => Ok(token),
        Err(CommitError::Precondition(_)) => bail!("this installation is initialised already"),
        Err(CommitError::Unavailable(error)) => Err(error.into()),
    }
}
