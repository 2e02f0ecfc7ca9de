use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use scaivault_domain::backend::{KvMount, VaultTarget};
use scaivault_domain::secret::State;

use super::*;
use crate::SecretBackend as _;
use crate::testing::{Reply, Server, json, lease};
use crate::vault::tests::{DENIED, LOOKUP, MOUNTS, V1, name, v2, vault};

const NOTHING: &str = r#"{"errors":[]}"#;
/// What HashiCorp Vault says to a path that it does not know.
const NO_SUCH_PATH: &str =
    r#"{"data":null,"warnings":["Invalid path for a versioned K/V secrets engine. See the API docs"]}"#;

/// Metadata with these versions, the last of them current.
fn info(lives: &[&str]) -> String {
    let life = |(index, life): (usize, &&str)| format!(r#""{}":{{{}}}"#, index + 1, life_of(life));
    let versions: Vec<_> = lives.iter().enumerate().map(life).collect();
    let (current, versions) = (lives.len(), versions.join(","));
    format!(r#"{{"current_version":{current},"custom_metadata":null,"versions":{{{versions}}}}}"#)
}

fn life_of(state: &str) -> String {
    let deleted = if state == "deleted" { "2026-01-02T00:00:00Z" } else { "" };
    let destroyed = state == "destroyed";
    format!(
        r#""created_time":"2026-01-01T00:00:00.123456789Z","deletion_time":"{deleted}","destroyed":{destroyed}"#
    )
}

fn listing(keys: &[(&str, Option<String>)]) -> Reply {
    let names: Vec<_> = keys.iter().map(|(key, _)| format!("{key:?}")).collect();
    let infos = keys.iter().filter_map(|(key, info)| Some(format!("{key:?}:{}", info.as_ref()?)));
    let infos: Vec<_> = infos.collect();
    json(200, &format!(r#"{{"data":{{"keys":[{}],"key_info":{{{}}}}}}}"#, names.join(","), infos.join(",")))
}

fn names(keys: &[&str]) -> Reply {
    let keys: Vec<_> = keys.iter().map(|key| (*key, None)).collect();
    listing(&keys)
}

type Seens = BTreeMap<String, Option<(String, State)>>;

/// Takes all steps, one after the other.
async fn survey(vault: &VaultBackend, root: Option<&RemoteName>) -> Result<SurveyPage, BackendError> {
    let (mut open, mut all) = (vec![Step::Tree(root.cloned())], SurveyPage::default());
    while let Some(step) = open.pop() {
        let found = vault.survey(&lease("t"), &step, &Calls::default()).await?;
        all.secrets.extend(found.page.secrets);
        all.forbidden.extend(found.page.forbidden);
        open.extend(found.next);
    }
    Ok(all)
}

fn seens(page: &SurveyPage) -> Seens {
    let seen = |seen: &Seen| (seen.remote_version.clone(), seen.state);
    page.secrets.iter().map(|s| (s.name.as_str().to_owned(), s.seen.as_ref().map(seen))).collect()
}

fn expected(secrets: &[(&str, Option<(&str, State)>)]) -> Seens {
    let seen = |(name, seen): &(&str, Option<(&str, State)>)| {
        ((*name).to_owned(), seen.map(|(version, state)| (version.to_owned(), state)))
    };
    secrets.iter().map(seen).collect()
}

fn below(path: &str, infix: &str) -> Option<String> {
    path.strip_prefix(&format!("/v1/kv/{infix}")).map(str::to_owned)
}

#[tokio::test]
async fn openbao_gives_a_whole_tree_in_one_call() {
    let (server, vault) = v2(|_| {
        listing(&[
            ("b", Some(info(&["active", "deleted"]))),
            ("a", Some(info(&["active"]))),
            ("z/x", Some(info(&["destroyed"]))),
            ("a/sp ace?/ö%", Some(info(&["deleted", "active"]))),
            ("only metadata", Some(info(&[]))),
            ("untold", None),
        ])
    })
    .await;
    let found = survey(&vault, Some(&name("kv/data/app"))).await.expect("a survey");
    let secrets = expected(&[
        ("kv/data/app/a", Some(("1", State::Active))),
        ("kv/data/app/a/sp ace?/ö%", Some(("2", State::Active))),
        ("kv/data/app/b", Some(("2", State::Deleted))),
        ("kv/data/app/untold", None),
        ("kv/data/app/z/x", Some(("1", State::Destroyed))),
    ]);
    assert_eq!(seens(&found), secrets);
    assert!(found.secrets.iter().all(|secret| secret.name.literal() == 2));
    assert_eq!(server.paths()[1..], ["/v1/kv/detailed-metadata/app?scan=true"]);
}

#[tokio::test]
async fn a_read_has_the_token_of_the_survey() {
    let (_server, vault) = v2(|path| match path {
        "/v1/kv/data/x" => json(
            200,
            r#"{"data":{"data":{},"metadata":{"created_time":"2026-01-01T00:00:00.123456789Z","deletion_time":"",
                "destroyed":false,"version":1,"custom_metadata":{"a":"b","c":"d"}}}}"#,
        ),
        _ => listing(&[("x", Some(info(&["active"]).replace("null", r#"{"c":"d","a":"b"}"#)))]),
    })
    .await;
    let found = survey(&vault, Some(&name("kv/data"))).await.expect("a survey");
    let read = vault.read(&lease("t"), &name("kv/data/x")).await.expect("a value");
    assert!(read.seen().is_some());
    assert_eq!(read.seen(), found.secrets[0].seen);
}

#[tokio::test]
async fn where_a_scan_is_forbidden_versions_are_listed_and_that_is_remembered() {
    let (server, vault) = v2(|path| match path {
        LOOKUP => json(200, r#"{"data":{}}"#),
        _ if path.ends_with("scan=true") => json(403, DENIED),
        "/v1/kv/detailed-metadata?list=true&limit=5000" => {
            let folder = |key| (key, Some("{}".to_owned()));
            listing(&[("a", Some(info(&["active"]))), ("a/", Some(info(&["active"]))), folder("f/")])
        }
        "/v1/kv/detailed-metadata/a?list=true&limit=5000"
        | "/v1/kv/detailed-metadata/f?list=true&limit=5000" => listing(&[("b", Some(info(&["active"])))]),
        _ => json(500, "{}"),
    })
    .await;
    let all = expected(&[
        ("kv/data/a", Some(("1", State::Active))),
        ("kv/data/a/b", Some(("1", State::Active))),
        ("kv/data/f/b", Some(("1", State::Active))),
    ]);
    for _ in 0..2 {
        let found = survey(&vault, Some(&name("kv/data"))).await.expect("a survey");
        assert_eq!(seens(&found), all);
    }
    let scans = server.paths().iter().filter(|path| path.contains("scan")).count();
    assert_eq!((scans, server.paths().len()), (1, 1 + 2 + 6));
}

#[tokio::test]
async fn hashicorp_vault_is_walked_by_names() {
    let (server, vault) = v2(|path| match below(path, "metadata").as_deref() {
        _ if path == LOOKUP => json(200, r#"{"data":{}}"#),
        None => json(404, NO_SUCH_PATH),
        Some("?list=true&limit=5000") => names(&["a", "a/", "gone", "mine", "mine/"]),
        Some("/a?list=true&limit=5000") => names(&["b c"]),
        Some("/mine" | "/mine?list=true&limit=5000") => json(403, DENIED),
        Some("/a" | "/a/b%20c") => json(200, &format!(r#"{{"data":{}}}"#, info(&["active", "deleted"]))),
        Some(_) => json(404, NOTHING),
    })
    .await;
    let found = survey(&vault, Some(&name("kv/data"))).await.expect("a survey");
    let deleted = Some(("2", State::Deleted));
    // A secret whose metadata is closed may be open itself: a read tells.
    let all = [("kv/data/a", deleted), ("kv/data/a/b c", deleted), ("kv/data/mine", None)];
    assert_eq!(seens(&found), expected(&all));
    let folder = RemoteEntry { name: name("kv/data/mine"), kind: EntryKind::Folder };
    assert_eq!(found.forbidden, [folder]);
    survey(&vault, Some(&name("kv/data"))).await.expect("a survey");
    let detailed = server.paths().iter().filter(|path| path.contains("detailed")).count();
    assert_eq!(detailed, 2, "what Vault does not know is not asked again");
}

#[tokio::test]
async fn version_1_tells_names_only() {
    let server = Server::start(|path| match path {
        _ if path.starts_with(MOUNTS) => json(200, V1),
        "/v1/kv/data?list=true" => names(&["a", "a/"]),
        "/v1/kv/data/a?list=true" => names(&["b"]),
        _ => json(500, "{}"),
    })
    .await;
    let found = survey(&vault(&server.target()), Some(&name("kv/data"))).await.expect("a survey");
    assert_eq!(seens(&found), expected(&[("kv/data/a", None), ("kv/data/a/b", None)]));
}

#[tokio::test]
async fn the_whole_store_is_its_configured_mount() {
    let server = Server::start(|_| listing(&[("a/b", Some(info(&["active"])))])).await;
    let kv = Some(KvMount { path: "team/kv".into(), version: KvVersion::V2 });
    let vault = vault(&VaultTarget { kv, ..server.target() });
    for root in [None, Some(RemoteName::with_literal("team", 0))] {
        let found = survey(&vault, root.as_ref()).await.expect("a survey");
        assert_eq!(found.secrets[0].name, RemoteName::with_literal("team/kv/a/b", 0));
    }
    assert_eq!(server.paths(), ["/v1/team/kv/detailed-metadata?scan=true"; 2]);
}

#[tokio::test]
async fn a_survey_that_may_see_nothing_fails() {
    let (_server, vault) =
        v2(|path| if path == LOOKUP { json(200, r#"{"data":{}}"#) } else { json(403, DENIED) }).await;
    assert_eq!(survey(&vault, Some(&name("kv/data"))).await, Err(BackendError::Forbidden));
}

#[tokio::test]
async fn a_tree_is_empty_only_if_its_names_say_so() {
    let (server, vault) = v2(|path| match path {
        _ if path.contains("/detailed-metadata") => json(200, r#"{"data":{}}"#),
        "/v1/kv/metadata?list=true&limit=5000" => names(&["a"]),
        "/v1/kv/metadata/a" => json(200, &format!(r#"{{"data":{}}}"#, info(&["active"]))),
        _ => json(404, NOTHING),
    })
    .await;
    let found = survey(&vault, Some(&name("kv/data"))).await.expect("a survey");
    assert_eq!(found.secrets.len(), 1);
    let none = survey(&vault, Some(&name("kv/data/none"))).await.expect("a survey");
    assert_eq!(none, SurveyPage::default());
    assert_eq!(server.paths().last().map(String::as_str), Some("/v1/kv/metadata/none?list=true&limit=5000"));
}

#[tokio::test]
async fn an_outage_in_the_middle_is_no_shorter_survey() {
    for status in [429, 500, 503] {
        let (_server, vault) = v2(move |path| match below(path, "metadata").as_deref() {
            None => json(404, NO_SUCH_PATH),
            Some("?list=true&limit=5000") => names(&["a", "b/"]),
            Some("/a") => json(200, &format!(r#"{{"data":{}}}"#, info(&["active"]))),
            Some(_) => json(status, "{}"),
        })
        .await;
        assert!(survey(&vault, Some(&name("kv/data"))).await.is_err());
    }
}

/// A page of as many keys as were asked for, beginning with `first`.
fn full_page(first: char) -> Reply {
    let keys: Vec<_> = (0..KEYS_PER_SURVEY_PAGE).map(|n| format!("{first}{n:05}")).collect();
    let keys: Vec<_> = keys.iter().map(|key| (key.as_str(), Some(info(&["active"])))).collect();
    listing(&keys)
}

#[tokio::test]
async fn pages_are_followed_to_their_end_and_never_in_circles() {
    for (second, outcome) in [
        // OpenBao.
        ('b', Ok(2 * KEYS_PER_SURVEY_PAGE + 1)),
        // It gave everything already.
        ('a', Ok(KEYS_PER_SURVEY_PAGE)),
        // It goes back.
        ('A', Err(())),
    ] {
        let pages = Arc::new(AtomicUsize::new(0));
        let (_server, vault) = v2(move |path| match pages.load(Ordering::SeqCst) {
            _ if path.contains("scan") || path.contains("/kv/metadata") => json(400, NOTHING),
            0 => {
                pages.fetch_add(1, Ordering::SeqCst);
                full_page('a')
            }
            _ if path.ends_with("&after=a04999") => full_page(second),
            _ => listing(&[("c", Some(info(&["active"])))]),
        })
        .await;
        let found = survey(&vault, Some(&name("kv/data"))).await;
        assert_eq!(found.map(|found| found.secrets.len()).map_err(drop), outcome, "{second}");
    }
}

#[tokio::test]
async fn a_listing_that_names_something_twice_is_not_taken() {
    let (_server, vault) = v2(|_| names(&["a", "b", "a"])).await;
    let found = survey(&vault, Some(&name("kv/data"))).await;
    assert!(matches!(found, Err(BackendError::InvalidAnswer(_))));
}

#[tokio::test]
async fn names_that_no_path_can_have_are_told_and_not_asked_about() {
    let long = "l".repeat(LONGEST_NAME);
    let odd = ["/", "..", "../", ".", &long, &format!("{long}/")].map(str::to_owned);
    let (server, vault) = v2({
        let odd = odd.clone();
        move |path| match path {
            "/v1/kv/metadata?list=true&limit=5000" => names(&odd.each_ref().map(String::as_str)),
            _ => json(404, NO_SUCH_PATH),
        }
    })
    .await;
    let found = survey(&vault, Some(&name("kv/data"))).await.expect("a survey");
    let all: Vec<_> = odd.iter().map(|key| (format!("kv/data/{key}"), None)).collect();
    assert_eq!(seens(&found), BTreeMap::from_iter(all));
    assert_eq!(server.paths().len(), 4, "the mount, two ways that Vault does not know, and the listing");
}

#[tokio::test]
async fn a_tree_without_a_bottom_is_left_at_some_depth() {
    let (server, vault) = v2(|path| match below(path, "metadata") {
        None => json(404, NO_SUCH_PATH),
        Some(_) => names(&["d/"]),
    })
    .await;
    let found = survey(&vault, Some(&name("kv/data"))).await.expect("a survey");
    assert_eq!(found.secrets.len(), 1, "the folder that is not looked into is told");
    assert!(server.paths().len() < 2 * MOST_SEGMENTS);
}
