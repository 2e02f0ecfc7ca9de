//! The least that a server could do: the same libraries, the same bytes, nothing in between.

use std::fs;
use std::path::Path;

use anyhow::Result;
use axum::Router;
use axum::body::Bytes;
use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, CONTENT_TYPE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::IntoResponse;
use axum::serve::ListenerExt as _;
use prost::Message as _;
use scaivault_proto::secrets::v1::secrets_service_server::{SecretsService, SecretsServiceServer};
use scaivault_proto::secrets::v1::{
    BatchGetRequest, BatchGetResponse, DeleteRequest, DeleteResponse, GetRequest, GetResponse, ListRequest,
    ListResponse, ListVersionsRequest, ListVersionsResponse, PutRequest, PutResponse,
};
use tokio::net::TcpListener;
use tonic::transport::Server;
use tonic::{Request as Call, Response as Reply, Status, async_trait};

use crate::subjects::VAULT_TOKEN;

/// A bare unary service that gives every caller the message in the file `answer`.
#[tokio::main]
pub(crate) async fn tonic(address: &str, answer: &Path) -> Result<()> {
    let answer = GetResponse::decode(fs::read(answer)?.as_slice())?;
    let service = SecretsServiceServer::new(Same(answer));
    Ok(Server::builder().add_service(service).serve(address.parse()?).await?)
}

/// A bare handler that gives every caller the bytes of the file `answer`.
#[tokio::main]
pub(crate) async fn axum(address: &str, answer: &Path) -> Result<()> {
    let answer = Bytes::from(fs::read(answer)?);
    let get = axum::routing::get(|State(answer): State<Bytes>| async {
        ([(CONTENT_TYPE, "application/json")], answer)
    });
    serve(address, Router::new().route("/v1/secrets/{*path}", get).with_state(answer)).await
}

/// A handler that asks `upstream` the same and hands its answer on.
#[tokio::main]
pub(crate) async fn passthrough(address: &str, upstream: &str) -> Result<()> {
    let upstream = (scaivault_tests::http::client(None)?, upstream.to_owned());
    serve(address, Router::new().fallback(hand_on).with_state(upstream)).await
}

async fn hand_on(
    State((http, upstream)): State<(reqwest::Client, String)>,
    headers: HeaderMap,
    request: Request,
) -> Result<impl IntoResponse, StatusCode> {
    let shown = [VAULT_TOKEN, AUTHORIZATION.as_str()].into_iter();
    let (name, token) =
        shown.filter_map(|name| Some((name, headers.get(name)?))).next().ok_or(StatusCode::UNAUTHORIZED)?;
    let asked = request.uri().path_and_query().map_or("/", |asked| asked.as_str());
    let asked = http.get(format!("{upstream}{asked}")).header(name, token);
    let answer = asked.send().await.map_err(|_| StatusCode::BAD_GATEWAY)?;
    let status = answer.status();
    let body = answer.bytes().await.map_err(|_| StatusCode::BAD_GATEWAY)?;
    Ok((status, [(CONTENT_TYPE, "application/json")], body))
}

async fn serve(address: &str, router: Router) -> Result<()> {
    let listener = TcpListener::bind(address).await?.tap_io(|stream| {
        // Slower without, that is all.
        drop(stream.set_nodelay(true));
    });
    Ok(axum::serve(listener, router).await?)
}

/// Answers every `Get` the same.
struct Same(GetResponse);

#[async_trait]
impl SecretsService for Same {
    async fn get(&self, _: Call<GetRequest>) -> Result<Reply<GetResponse>, Status> {
        Ok(Reply::new(self.0.clone()))
    }

    async fn batch_get(&self, _: Call<BatchGetRequest>) -> Result<Reply<BatchGetResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn list(&self, _: Call<ListRequest>) -> Result<Reply<ListResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn put(&self, _: Call<PutRequest>) -> Result<Reply<PutResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn delete(&self, _: Call<DeleteRequest>) -> Result<Reply<DeleteResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn list_versions(
        &self,
        _: Call<ListVersionsRequest>,
    ) -> Result<Reply<ListVersionsResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}
