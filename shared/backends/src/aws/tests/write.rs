use super::*;
use crate::Written;

/// A secret as AWS keeps it, with every rule about stages that a write rests on.
#[derive(Default)]
struct Shelf {
    /// Values by version, in the order in which they came.
    versions: Vec<(String, Json)>,
    /// Versions by stage.
    stages: HashMap<String, String>,
    tags: Metadata,
    exists: bool,
    deleted: bool,
}

impl Shelf {
    fn holding(version: &str) -> Self {
        let mut shelf = Shelf { exists: true, ..Shelf::default() };
        shelf.put(version, json!({"SecretString": "old"}), &["AWSCURRENT".to_owned()]);
        shelf
    }

    fn put(&mut self, version: &str, value: Json, stages: &[String]) {
        if self.versions.iter().all(|(known, _)| known != version) {
            self.versions.push((version.to_owned(), value));
            stages.iter().for_each(|stage| self.move_stage(stage, version));
        }
    }

    fn move_stage(&mut self, stage: &str, version: &str) {
        let from = self.stages.insert(stage.to_owned(), version.to_owned());
        if let Some(from) = from.filter(|from| stage == "AWSCURRENT" && from != version) {
            self.stages.insert("AWSPREVIOUS".to_owned(), from);
        }
    }

    fn answer(&mut self, action: &str, body: &Json) -> Reply {
        let text = |field: &str| body[field].as_str().map(str::to_owned);
        let id = || json!({"Name": "prod/db", "ARN": ARN, "VersionId": text("ClientRequestToken")});
        let value = json!({"SecretString": body["SecretString"], "SecretBinary": body["SecretBinary"]});
        if action == "CreateSecret" {
            let again =
                self.versions.iter().any(|(version, _)| Some(version) == text("ClientRequestToken").as_ref());
            if self.exists && !again {
                return refusal("ResourceExistsException");
            }
            self.exists = true;
            self.put(&text("ClientRequestToken").expect("a token"), value, &["AWSCURRENT".to_owned()]);
            self.tag(&body["Tags"]);
            return ok(&id());
        }
        if !self.exists {
            return refusal("ResourceNotFoundException");
        }
        if self.deleted && action != "DescribeSecret" {
            return refusal_with("InvalidRequestException", "it was marked for deletion.");
        }
        match action {
            "PutSecretValue" => {
                let stages =
                    body["VersionStages"].as_array().map_or(vec!["AWSCURRENT".to_owned()], |stages| {
                        stages.iter().map(|stage| stage.as_str().expect("a stage").to_owned()).collect()
                    });
                let first = self.versions.is_empty().then(|| "AWSCURRENT".to_owned());
                let stages: Vec<_> = stages.into_iter().chain(first).collect();
                self.put(&text("ClientRequestToken").expect("a token"), value, &stages);
                ok(&id())
            }
            "UpdateSecretVersionStage" => {
                let stage = text("VersionStage").expect("a stage");
                if self.stages.get(&stage) != text("RemoveFromVersionId").as_ref() {
                    return refusal("InvalidParameterException");
                }
                match text("MoveToVersionId") {
                    Some(version) => self.move_stage(&stage, &version),
                    None => drop(self.stages.remove(&stage)),
                }
                ok(&id())
            }
            "DescribeSecret" => {
                ok(&json!({"Name": "prod/db", "ARN": ARN, "VersionIdsToStages": self.by_version(),
                "DeletedDate": self.deleted.then_some(1), "Tags": self.tag_list()}))
            }
            "ListSecrets" => ok(&json!({"SecretList": [{"Name": "prod/db", "ARN": ARN,
                "SecretVersionsToStages": self.by_version(), "Tags": self.tag_list()}]})),
            "GetSecretValue" => {
                match self.stages.get(body["VersionStage"].as_str().unwrap_or("AWSCURRENT")) {
                    Some(version) => ok(&super::value(json!({"VersionId": version, "SecretString": "x"}))),
                    None => refusal("ResourceNotFoundException"),
                }
            }
            "TagResource" => {
                self.tag(&body["Tags"]);
                ok(&json!({}))
            }
            "UntagResource" => {
                self.tags.retain(|key, _| !body["TagKeys"].as_array().expect("keys").contains(&json!(key)));
                ok(&json!({}))
            }
            "DeleteSecret" => {
                self.deleted = true;
                ok(&json!({"Name": "prod/db", "ARN": ARN, "DeletionDate": 1}))
            }
            _ => refusal("InvalidParameterException"),
        }
    }

    fn tag(&mut self, tags: &Json) {
        let text = |tag: &Json, field: &str| tag[field].as_str().expect("text").to_owned();
        let tags = tags.as_array().into_iter().flatten();
        self.tags.extend(tags.map(|tag| (text(tag, "Key"), text(tag, "Value"))));
    }

    fn tag_list(&self) -> Vec<Json> {
        self.tags.iter().map(|(key, value)| json!({"Key": key, "Value": value})).collect()
    }

    fn by_version(&self) -> HashMap<&str, Vec<&str>> {
        let mut stages: HashMap<&str, Vec<&str>> = HashMap::new();
        for (stage, version) in &self.stages {
            stages.entry(version).or_default().push(stage);
        }
        stages
    }
}

/// A server of one shelf, whose policy forbids some actions.
struct Store {
    fake: Fake,
    shelf: Arc<Mutex<Shelf>>,
}

impl Store {
    async fn start(shelf: Shelf, forbidden: &'static [&'static str]) -> Self {
        Self::start_with(shelf, move |_, action, _| {
            forbidden.contains(&action).then(|| refusal("AccessDeniedException"))
        })
        .await
    }

    /// Where `meddle` may do something first, and answer for the shelf.
    async fn start_with(
        shelf: Shelf,
        meddle: impl Fn(&mut Shelf, &str, &Json) -> Option<Reply> + Send + Sync + 'static,
    ) -> Self {
        let shelf = Arc::new(Mutex::new(shelf));
        let served = shelf.clone();
        let fake = Fake::start(move |action, body| {
            let mut shelf = served.lock().expect("no test panicked with it");
            meddle(&mut shelf, action, body).unwrap_or_else(|| shelf.answer(action, body))
        })
        .await;
        Store { fake, shelf }
    }

    async fn write(&self, write: &RemoteWrite) -> Result<Written, BackendError> {
        self.fake.aws.write(&lease("a"), &name("prod/db"), write).await
    }

    async fn delete(&self, expected: &str) -> Result<(), BackendError> {
        self.fake.aws.delete(&lease("a"), &name("prod/db"), expected).await
    }

    fn shelf(&self) -> MutexGuard<'_, Shelf> {
        self.shelf.lock().expect("no test panicked with it")
    }

    fn stage(&self, stage: &str) -> Option<String> {
        self.shelf().stages.get(stage).cloned()
    }
}

fn over(version: &str) -> RemoteWrite {
    RemoteWrite {
        value: SecretValue::new(b"new".to_vec()),
        kind: Kind::Text,
        content_type: "text/plain".into(),
        metadata: Metadata::new(),
        expected: Expected::Version(version.to_owned()),
    }
}

fn new() -> RemoteWrite {
    RemoteWrite { expected: Expected::Absent, ..over("") }
}

fn tagged(pairs: &[(&str, &str)]) -> Metadata {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

#[tokio::test]
async fn a_write_becomes_current_in_place_of_what_was_expected() {
    let store = Store::start(Shelf::holding(V1), &[]).await;
    let written = store.write(&over(V1)).await.expect("a write");
    assert_eq!(written.metadata, None);
    assert_eq!(store.stage("AWSCURRENT"), Some(written.remote_version));
    assert_eq!(store.stage("AWSPREVIOUS").as_deref(), Some(V1));
    assert_eq!(store.shelf().versions[1].1, json!({"SecretString": "new", "SecretBinary": null}));
    assert_eq!(store.fake.actions(), ["PutSecretValue", "UpdateSecretVersionStage", "DescribeSecret"]);
}

#[tokio::test]
async fn a_write_over_something_else_is_lost_and_changes_nothing() {
    let store = Store::start(Shelf::holding(V2), &[]).await;
    assert_eq!(store.write(&over(V1)).await, Err(BackendError::PreconditionLost));
    assert_eq!(store.stage("AWSCURRENT").as_deref(), Some(V2));
    assert_eq!(store.shelf().stages.len(), 1, "no label is left");
    assert_eq!(store.write(&new()).await, Err(BackendError::PreconditionLost));
    assert_eq!(store.stage("AWSCURRENT").as_deref(), Some(V2));
    let gone = Store::start(Shelf::default(), &[]).await;
    assert_eq!(gone.write(&over(V1)).await, Err(BackendError::PreconditionLost));
    let deleted = Store::start(Shelf { deleted: true, ..Shelf::holding(V1) }, &[]).await;
    assert_eq!(deleted.write(&over(V1)).await, Err(BackendError::PreconditionLost));
}

#[tokio::test]
async fn a_write_that_is_made_again_is_one_version() {
    let store = Store::start(Shelf::holding(V1), &[]).await;
    let first = store.write(&over(V1)).await;
    assert!(first.is_ok());
    assert_eq!(store.write(&over(V1)).await, first);
    assert_eq!(store.shelf().versions.len(), 2);
    let made = Store::start(Shelf::default(), &[]).await;
    assert_eq!(made.write(&new()).await, made.write(&new()).await);
    assert_eq!(made.shelf().versions.len(), 1);
}

#[tokio::test]
async fn the_id_of_a_version_tells_nothing_about_its_value() {
    let (one, other) = (Store::start(Shelf::default(), &[]).await, Store::start(Shelf::default(), &[]).await);
    let ids = [one.write(&new()).await, other.write(&new()).await]
        .map(|made| made.expect("a write").remote_version);
    assert_ne!(ids[0], ids[1], "the same value, under another key");
}

#[tokio::test]
async fn without_permission_to_move_stages_a_write_looks_before_and_after() {
    let forbidden = &["UpdateSecretVersionStage"][..];
    let store = Store::start(Shelf::holding(V1), forbidden).await;
    let written = store.write(&over(V1)).await.expect("a write");
    assert_eq!(store.stage("AWSCURRENT"), Some(written.remote_version.clone()));
    assert_eq!(store.write(&over(V1)).await.expect("the same").remote_version, written.remote_version);
    assert_eq!(store.fake.actions().iter().filter(|action| *action == "UpdateSecretVersionStage").count(), 1);
    let other = Store::start(Shelf::holding(V2), forbidden).await;
    assert_eq!(other.write(&over(V1)).await, Err(BackendError::PreconditionLost));
    assert_eq!(other.stage("AWSCURRENT").as_deref(), Some(V2));
}

#[tokio::test]
async fn what_came_between_a_look_and_a_write_is_noticed_and_kept() {
    let store = Store::start_with(Shelf::holding(V1), |shelf, action, body| match action {
        "UpdateSecretVersionStage" => Some(refusal("AccessDeniedException")),
        "PutSecretValue" if body["VersionStages"].is_null() => {
            shelf.put(V3, json!({}), &["AWSCURRENT".to_owned()]);
            None
        }
        _ => None,
    })
    .await;
    assert_eq!(store.write(&over(V1)).await, Err(BackendError::PreconditionLost));
    assert_eq!(store.stage("AWSPREVIOUS").as_deref(), Some(V3));
}

#[tokio::test]
async fn a_write_needs_no_descriptions() {
    let store = Store::start(Shelf::holding(V1), &["DescribeSecret", "UpdateSecretVersionStage"]).await;
    let write = RemoteWrite { metadata: tagged(&[("a", "1")]), ..over(V1) };
    let written = store.write(&write).await.expect("a write");
    assert_eq!(written.metadata, None);
    assert_eq!(store.stage("AWSCURRENT"), Some(written.remote_version));
    assert_eq!(store.shelf().tags, tagged(&[("a", "1")]));
}

#[tokio::test]
async fn a_secret_that_was_made_without_a_value_is_filled_in() {
    let store = Store::start(Shelf { exists: true, ..Shelf::default() }, &[]).await;
    let written = store.write(&new()).await.expect("a write");
    assert_eq!(store.stage("AWSCURRENT"), Some(written.remote_version));
}

#[tokio::test]
async fn a_binary_value_stays_binary() {
    let store = Store::start(Shelf::holding(V1), &[]).await;
    let write = RemoteWrite { value: SecretValue::new(vec![0, 255]), kind: Kind::Binary, ..over(V1) };
    store.write(&write).await.expect("a write");
    assert_eq!(store.shelf().versions[1].1, json!({"SecretString": null, "SecretBinary": "AP8="}));
}

#[tokio::test]
async fn a_value_that_is_too_large_is_not_sent() {
    let store = Store::start(Shelf::holding(V1), &[]).await;
    let sized = |bytes| RemoteWrite { value: SecretValue::new(vec![b'x'; bytes]), ..over(V1) };
    assert_eq!(store.write(&sized(65_537)).await, Err(BackendError::ValueTooLarge { most: 65_536 }));
    assert_eq!(store.fake.actions(), Vec::<String>::new());
    assert!(store.write(&sized(65_536)).await.is_ok());
}

#[tokio::test]
async fn tags_are_set_and_taken_away_but_for_those_that_were_never_ours() {
    let store = Store::start(Shelf::holding(V1), &[]).await;
    let long = "x".repeat(200);
    store.shelf().tags = tagged(&[("a", "1"), ("b", "2"), ("aws:x", "3"), (&long, "4")]);
    let write = RemoteWrite { metadata: tagged(&[("a", "1"), ("c", "5")]), ..over(V1) };
    assert_eq!(store.write(&write).await.expect("a write").metadata, None);
    assert_eq!(store.shelf().tags, tagged(&[("a", "1"), ("c", "5"), ("aws:x", "3"), (&long, "4")]));
    let tagging = &store.fake.requests()[3];
    assert_eq!(tagging.1["Tags"], json!([{"Key": "c", "Value": "5"}]), "only what changed");
}

#[tokio::test]
async fn a_value_is_written_even_if_its_tags_are_not() {
    let write = RemoteWrite { metadata: tagged(&[("a", "1")]), ..over(V1) };
    let store = Store::start(Shelf::holding(V1), &["TagResource"]).await;
    assert_eq!(store.write(&write).await.expect("a write").metadata, Some(BackendError::Forbidden));
    let create = RemoteWrite { expected: Expected::Absent, ..write };
    let tags_forbidden = |_: &mut Shelf, action: &str, body: &Json| {
        (action == "CreateSecret" && !body["Tags"].is_null()).then(|| refusal("AccessDeniedException"))
    };
    let store = Store::start_with(Shelf::default(), tags_forbidden).await;
    assert_eq!(store.write(&create).await.expect("a write").metadata, Some(BackendError::Forbidden));
    assert!(store.stage("AWSCURRENT").is_some());
    let unfit = RemoteWrite { metadata: tagged(&[("a", "1"), ("aws:b", "2"), ("c", "*")]), ..create };
    let store = Store::start(Shelf::default(), &[]).await;
    let written = store.write(&unfit).await.expect("a write");
    assert!(matches!(written.metadata, Some(BackendError::Unsupported(_))));
    assert_eq!(store.shelf().tags, tagged(&[("a", "1")]));
}

#[tokio::test]
async fn a_write_that_may_not_be_is_forbidden() {
    let store = Store::start(Shelf::holding(V1), &["PutSecretValue"]).await;
    assert_eq!(store.write(&over(V1)).await, Err(BackendError::Forbidden));
    let store = Store::start(Shelf::default(), &["CreateSecret"]).await;
    assert_eq!(store.write(&new()).await, Err(BackendError::Forbidden));
    assert!(store.shelf().versions.is_empty());
}

#[tokio::test]
async fn a_secret_is_deleted_for_a_while_and_only_if_it_is_as_expected() {
    let store = Store::start(Shelf::holding(V1), &[]).await;
    assert_eq!(store.delete(V2).await, Err(BackendError::PreconditionLost));
    assert!(!store.shelf().deleted);
    assert_eq!(store.delete(V1).await, Ok(()));
    assert_eq!(
        store.fake.requests().last().expect("a call").1,
        json!({"SecretId": "prod/db"}),
        "nothing forced"
    );
    assert_eq!(store.delete(V1).await, Ok(()), "as when the answer was lost");
    assert_eq!(store.delete(V2).await, Err(BackendError::NotActive(State::Deleted)));
    let blind = Store::start(Shelf::holding(V1), &["DescribeSecret"]).await;
    assert_eq!(blind.delete(V1).await, Ok(()));
    let gone = Store::start(Shelf::default(), &[]).await;
    assert_eq!(gone.delete(V1).await, Err(BackendError::NotFound));
}
