//! The fake of Google Cloud and, for what it has of it, drongo.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context as _, Result, bail};
use scaivault_backends::{Lease, Material};
use scaivault_domain::backend::{Endpoint, GcpTarget, ProjectId, Target, Tls};
use scaivault_domain::mapping::RemoteName;
use scaivault_domain::secret::{Kind, Metadata, State};
use scaivault_tests::fakes::gcp::{Gcp, PROJECT, Permission};
use scaivault_tests::http;
use scaivault_tests::servers::drongo::{Admin, Drongo};
use secrecy::SecretString;
use serde_json::Value;

use super::capabilities::{
    Capabilities, Closes, Deleted, Empty, HistoryOfNobody, Json, NoSecrets, Pages, Surveys, Told, Unfit,
    Versions, Writes,
};
use super::{Provider, Store, Tried, keeps, promises, suite};

/// Secrets in one page of the fake.
const PAGE: usize = 20;

/// Every store is a fake of its own.
struct Google;

/// One project, and an account that may use it.
pub(super) struct Project {
    fake: Gcp,
    token: String,
}

impl Provider for Google {
    type Store = Project;

    async fn start() -> Result<Self> {
        Ok(Google)
    }

    async fn store(&self, _: &str) -> Result<Project> {
        let fake = Gcp::start().await?;
        fake.set_page_size(PAGE);
        let url = format!("{}/computeMetadata/v1/instance/service-accounts/default/token", fake.url());
        let granted = http::client(None)?.get(url).header("Metadata-Flavor", "Google").send().await?;
        let granted: Value = granted.json().await?;
        let token = granted["access_token"].as_str().context("a token")?.to_owned();
        Ok(Project { fake, token })
    }
}

impl Project {
    fn newest(&self, leaf: &str) -> Result<usize> {
        Ok(self.fake.secrets().payloads(leaf)?.len())
    }
}

fn target(endpoint: Endpoint, project: &str) -> Target {
    let project = ProjectId::parse(project).expect("the suite names projects as Google does");
    Target::GoogleSecretManager(GcpTarget {
        project,
        location: None,
        endpoint: Some(endpoint),
        tls: Tls::default(),
    })
}

fn lease(token: &str) -> Lease {
    Lease {
        id: "gcp".to_owned(),
        material: Material::Bearer(SecretString::from(token)),
        expires_at: None,
        login_generation: 0,
    }
}

const CAN: Capabilities = Capabilities {
    title: "GCP Secret Manager",
    pages: Pages::Tokens { size: PAGE, empty: r#"{"nextPageToken":"{n}"}"# },
    surveys: Surveys::TellNames,
    versions: Versions::All,
    states: &[State::Disabled, State::Destroyed],
    deleted: Deleted::As(State::Disabled),
    kinds: &[Kind::Json, Kind::Text, Kind::Binary],
    empty: Empty::Refused,
    empty_objects: Empty::Carried,
    no_secrets: NoSecrets::Unsaid,
    json: Json::AsWritten,
    most_bytes: 65_536,
    good_names: &["a_b-C", "0"],
    bad_names: &["", "a.b", "a/b", "a b", "\u{e4}"],
    metadata: Told::ByListings,
    unfit: Unfit::Key("a b"),
    writes: Writes::Checked,
    closes: Closes::OneSecret,
    history_of_nobody: HistoryOfNobody::NotFound,
};

impl Store for Project {
    const CAN: Capabilities = CAN;

    fn socket(&self) -> SocketAddr {
        let address = self.fake.url().trim_start_matches("http://");
        address.parse().expect("the fake is at an address of loopback")
    }

    fn target(&self, endpoint: Endpoint) -> Target {
        target(endpoint, PROJECT)
    }

    fn lease(&self) -> Lease {
        lease(&self.token)
    }

    fn root(&self) -> Option<RemoteName> {
        None
    }

    fn longest(&self) -> RemoteName {
        self.name(&"x".repeat(255))
    }

    async fn put(&self, leaf: &str, value: &[u8], _: Kind) -> Result<()> {
        self.fake.secrets().put(leaf, value).map(drop)
    }

    async fn change(&self, leaf: &str, to: State) -> Result<()> {
        let newest = self.newest(leaf)?;
        match to {
            State::Disabled => self.fake.secrets().disable(leaf, newest),
            State::Destroyed => self.fake.secrets().destroy(leaf, newest),
            _ => bail!("GCP has no such state"),
        }
    }

    async fn restore(&self, leaf: &str) -> Result<()> {
        self.fake.secrets().enable(leaf, self.newest(leaf)?)
    }

    async fn describe(&self, leaf: &str, metadata: &Metadata) -> Result<()> {
        let mut labels: Vec<_> = metadata.iter().map(|(key, value)| (&**key, &**value)).collect();
        // One of each kind, if there are two.
        let annotations = labels.split_off(labels.len().min(1));
        self.fake.secrets().set_labels(leaf, &labels)?;
        self.fake.secrets().set_annotations(leaf, &annotations)
    }

    async fn forbid(&self, leaf: &str) -> Result<()> {
        self.fake.secrets().forbid(leaf);
        Ok(())
    }

    async fn forbid_listing(&self) -> Result<()> {
        self.fake.deny(&self.fake.default_account(), Permission::SecretsList);
        Ok(())
    }

    async fn revoke(&self) -> Result<()> {
        self.fake.revoke_tokens(&self.fake.default_account());
        Ok(())
    }
}

#[tokio::test]
async fn gcp_keeps_the_contract() -> Result<()> {
    keeps::<Google>(suite()).await
}

/// A server that others wrote. Its stores are projects.
struct Emulator {
    server: Drongo,
    projects: AtomicUsize,
}

struct EmulatedProject {
    socket: SocketAddr,
    admin: Admin,
    project: String,
}

impl Provider for Emulator {
    type Store = EmulatedProject;

    async fn start() -> Result<Self> {
        Ok(Emulator { server: Drongo::start().await?, projects: AtomicUsize::new(0) })
    }

    async fn store(&self, _: &str) -> Result<EmulatedProject> {
        let project = format!("project-{}", self.projects.fetch_add(1, Ordering::Relaxed));
        let admin = self.server.client(&project)?;
        Ok(EmulatedProject { socket: self.server.socket(), admin, project })
    }
}

impl Store for EmulatedProject {
    /// It has no pages and no annotations, takes anybody for anybody, and its `latest` is the newest enabled version,
    /// where Google's is the newest of all.
    const CAN: Capabilities = Capabilities { pages: Pages::One, closes: Closes::Nothing, states: &[], ..CAN };

    fn socket(&self) -> SocketAddr {
        self.socket
    }

    fn target(&self, endpoint: Endpoint) -> Target {
        target(endpoint, &self.project)
    }

    fn lease(&self) -> Lease {
        lease("anybody")
    }

    fn root(&self) -> Option<RemoteName> {
        None
    }

    fn longest(&self) -> RemoteName {
        self.name(&"x".repeat(255))
    }

    async fn put(&self, leaf: &str, value: &[u8], _: Kind) -> Result<()> {
        if self.admin.access(leaf, "latest").await?.is_none() {
            self.admin.create_secret(leaf, &[]).await?;
        }
        self.admin.add_version(leaf, value).await.map(drop)
    }

    async fn change(&self, leaf: &str, to: State) -> Result<()> {
        match to {
            State::Disabled => self.admin.disable_version(leaf, 1).await,
            _ => bail!("drongo has no such state"),
        }
    }

    async fn restore(&self, leaf: &str) -> Result<()> {
        self.admin.enable_version(leaf, 2).await
    }

    async fn describe(&self, _: &str, _: &Metadata) -> Result<()> {
        bail!("drongo has no annotations")
    }

    async fn forbid(&self, _: &str) -> Result<()> {
        Ok(())
    }

    async fn forbid_listing(&self) -> Result<()> {
        Ok(())
    }

    async fn revoke(&self) -> Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn gcp_keeps_what_another_server_of_its_protocol_shows() -> Result<()> {
    let shown: &[Tried<EmulatedProject>] = all_of![
        a_listing_names_every_secret_once_however_many_pages_there_are
        values_come_back_as_they_are
        values_are_written_as_they_are
        sizes_are_checked_before_anything_is_sent
        names_at_the_edge_work_and_beyond_it_nothing_is_sent
        what_is_not_there_is_not_found
        versions_are_told_oldest_first_and_read_by_name
        a_write_is_done_only_where_nothing_else_came_first
        a_write_that_is_made_again_makes_no_second_version
        whether_a_value_may_be_read_is_found_out_without_reading_it
        faults_of_the_server_are_told_apart
        what_is_not_the_protocol_is_no_answer
        a_page_in_front_of_the_store_never_says_that_something_is_gone
        a_throttled_store_is_asked_later_and_not_given_up
        a_fault_that_passes_is_survived
    ];
    keeps::<Emulator>(shown.to_vec()).await
}
