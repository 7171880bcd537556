//! Registries that want to know who it is.

use std::{env, fs, path::Path, process::Command};

use vm_oci::{Client, CredentialStore, Credentials, OciError, forget, silent};

use crate::{
    bench::{AT, at, client, in_namespace, run, skopeo_copy, with_credentials},
    made::one,
    proxy::{Fault, Proxy},
};

#[test]
fn a_registry_with_passwords_lets_in_who_has_logged_in() {
    in_namespace(|bench| async move {
        let _registry = bench.registry_for_ann().await;
        one(&bench.path("layout"), 1000);
        let (from, to) = (format!("oci:{}:v1", bench.text("layout")), format!("docker://{AT}/tool:v1"));
        skopeo_copy(&from, &to, &["--dest-creds", "ann:secret"]);
        let (store, file, reference) = (bench.store(), bench.path("auth.json"), at(AT, "tool:v1"));
        let error = client().pull(&reference, &store, &silent()).await.unwrap_err();
        assert!(matches!(error, OciError::Unauthorized { known: false, push: false, .. }), "{error}");
        assert!(error.hint().contains("log in"), "{}", error.hint());

        let error = client().login(AT, "ann", "wrong", &file).await.unwrap_err();
        assert!(matches!(error, OciError::LoginRefused { .. }) && !file.exists(), "{error}");
        client().login(AT, "ann", "secret", &file).await.unwrap();
        let known = Client::new(with_credentials(&file)).unwrap();
        let image = known.pull(&reference, &store, &silent()).await.unwrap();
        known.push(&image, &store, &at(AT, "other:v1"), &silent()).await.unwrap();
        assert!(forget(&file, AT).unwrap());
        let error = known.push(&image, &store, &at(AT, "third:v1"), &silent()).await.unwrap_err();
        assert!(matches!(error, OciError::Unauthorized { push: true, known: false, .. }), "{error}");
        // "ann:wrong", as somebody's file has it.
        fs::write(&file, format!(r#"{{ "auths": {{ "{AT}": {{ "auth": "YW5uOndyb25n" }} }} }}"#)).unwrap();
        let error = known.pull(&reference, &store, &silent()).await.unwrap_err();
        assert!(matches!(error, OciError::Unauthorized { known: true, .. }), "{error}");
        assert!(!format!("{error:?}").contains("wrong"));
    });
}

#[test]
fn a_registry_with_tokens_gives_them_to_everybody_or_to_users() {
    in_namespace(|bench| async move {
        let _registry = bench.registry().await;
        let (_, image) = one(&bench.path("layout"), 100_000);
        skopeo_copy(
            &format!("oci:{}:v1", bench.text("layout")),
            &format!("docker://{AT}/a/tool:v1"),
            &["--preserve-digests"],
        );
        let (proxy, store) = (Proxy::start().await, bench.store());
        let challenge =
            |scheme: &str| format!("Bearer realm=\"{scheme}://{}/token\",service=\"test\"", proxy.address);
        proxy.gate("Bearer let-me-in", &challenge("http"));
        let token = Fault::Answer("200 OK", String::new(), r#"{"token":"let-me-in","expires_in":60}"#);
        proxy.on("/token", 1, Fault::Answer("503 Busy", String::new(), ""));
        proxy.on("/token", 1, token.clone());
        let reference = at(proxy.address, "a/tool:v1");
        client().pull(&reference, &store, &silent()).await.unwrap();
        let asked = proxy.asked("/token");
        assert_eq!(asked.len(), 2, "one that is busy is asked again, and one token is enough for all");
        assert!(
            asked[1].path.contains("service=test")
                && asked[1].path.contains("scope=repository%3Aa%2Ftool%3Apull"),
            "{asked:?}"
        );
        assert_eq!(asked[1].authorization, None);

        // One that runs out in the middle is renewed.
        store.remove(&image.layers[0]).unwrap();
        proxy.on(
            &image.layers[0].to_string(),
            1,
            Fault::Answer("401 No", format!("WWW-Authenticate: {}\r\n", challenge("http")), ""),
        );
        proxy.on("/token", 1, token.clone());
        proxy.on("/token", 1, Fault::Answer("200 OK", String::new(), r#"{"access_token":"newer"}"#));
        let error = client().pull(&reference, &store, &silent()).await.unwrap_err();
        assert!(
            matches!(error, OciError::Unauthorized { .. }),
            "the gate does not know the newer one: {error}"
        );
        assert_eq!(proxy.asked("Bearer").len(), 0);
        let shown = proxy.asked(&image.layers[0].to_string()).last().unwrap().authorization.clone();
        assert_eq!(shown.as_deref(), Some("Bearer newer"));

        // A user is shown to the token service alone, and one with a token of its own gets a token for it.
        let file = bench.path("auth.json");
        let known = |entry: &str| {
            fs::write(&file, format!(r#"{{ "auths": {{ "{}": {entry} }} }}"#, proxy.address)).unwrap();
            Client::new(with_credentials(&file)).unwrap()
        };
        proxy.forget();
        proxy.on("/token", 1, token.clone());
        known(r#"{ "username": "ann", "password": "secret" }"#)
            .pull(&reference, &store, &silent())
            .await
            .unwrap();
        assert_eq!(proxy.asked("/token")[0].authorization.as_deref(), Some("Basic YW5uOnNlY3JldA=="));
        let basic = proxy
            .asked("/v2/")
            .iter()
            .filter(|asked| asked.authorization.as_deref().is_some_and(|text| text.starts_with("Basic")))
            .count();
        assert_eq!(basic, 0);
        proxy.forget();
        proxy.on("/token", 1, token);
        known(r#"{ "identitytoken": "long-lived" }"#).pull(&reference, &store, &silent()).await.unwrap();
        assert_eq!(proxy.asked("/token")[0].method, "POST");
        proxy.on("/token", 1, Fault::Answer("401 No", String::new(), "who are you?"));
        let error = known(r#"{ "username": "ann", "password": "secret" }"#)
            .pull(&reference, &store, &silent())
            .await
            .unwrap_err();
        assert!(matches!(error, OciError::Unauthorized { known: true, .. }), "{error}");
        // Where a token service answers nonsense, nothing of it is shown.
        proxy.on("/token", 1, Fault::Answer("200 OK", String::new(), r#"{"t0ken":"half-of-it"}"#));
        let error = client().pull(&reference, &store, &silent()).await.unwrap_err();
        assert!(
            matches!(error, OciError::Answer { .. }) && !format!("{error:?}").contains("half"),
            "{error}"
        );
    });
}

/// Where the process that has helpers in its PATH finds its file.
const HELPED: &str = "VM_OCI_TEST_HELPED";

/// Keeps what it is asked for, and knows two registries.
const HELPER: &str = r#"#!/bin/sh
read -r registry || true
case "$1 $registry" in
"get known.example:5000") echo '{"ServerURL":"known.example:5000","Username":"ann","Secret":"s"}' ;;
"get token.example") echo '{"ServerURL":"token.example","Username":"<token>","Secret":"t"}' ;;
"get broken.example") echo "the keyring is locked"; exit 1 ;;
"get https://index.docker.io/v1/") echo '{"ServerURL":"","Username":"bob","Secret":"x"}' ;;
*) echo "credentials not found in native keychain"; exit 1 ;;
esac
"#;

#[tokio::test]
#[ignore = "the part of the next test that has helpers in its PATH"]
async fn the_one_with_helpers() {
    let Ok(file) = env::var(HELPED) else { return };
    let store = CredentialStore::new([Path::new(&file).to_owned()]);
    let basic =
        |user: &str, password: &str| Credentials::Basic { user: user.into(), password: password.into() };
    for (registry, expected) in [
        ("known.example:5000", basic("ann", "s")),
        ("docker.io", basic("bob", "x")),
        ("token.example", Credentials::Identity("t".into())),
        ("other.example", Credentials::Anonymous),
    ] {
        assert!(store.find(registry).await.unwrap() == expected, "{registry}");
    }
    let error = store.find("broken.example").await.unwrap_err();
    assert!(error.to_string().contains("docker-credential-test failed: the keyring is locked"), "{error}");
}

#[test]
fn helpers_are_asked_for_what_a_file_leaves_to_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    fs::write(path("helper"), HELPER).unwrap();
    run("install", &["-m", "755", &path("helper"), &path("docker-credential-test")]);
    fs::write(path("config.json"), r#"{ "auths": { "known.example:5000": {} }, "credsStore": "test" }"#)
        .unwrap();
    let programs = format!("{}:{}", dir.path().display(), env::var("PATH").unwrap());
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", "login::the_one_with_helpers", "--ignored"])
        .env("PATH", programs)
        .env(HELPED, path("config.json"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

#[test]
fn a_password_does_not_go_where_a_redirect_leads() {
    in_namespace(|bench| async move {
        let _registry = bench.registry_for_ann().await;
        let (_, image) = one(&bench.path("layout"), 1000);
        let (from, to) = (format!("oci:{}:v1", bench.text("layout")), format!("docker://{AT}/tool:v1"));
        skopeo_copy(&from, &to, &["--dest-creds", "ann:secret", "--preserve-digests"]);
        let (proxy, stranger, file) = (Proxy::start().await, Proxy::start().await, bench.path("auth.json"));
        client().login(&proxy.address.to_string(), "ann", "secret", &file).await.unwrap();
        let layer = image.layers[0].to_string();
        let elsewhere = format!("Location: http://{}/{layer}\r\n", stranger.address);
        proxy.on(&layer, usize::MAX, Fault::Answer("307 Elsewhere", elsewhere, ""));
        let challenge =
            format!("WWW-Authenticate: Bearer realm=\"http://{}/token\",service=\"x\"\r\n", stranger.address);
        stranger.on("", usize::MAX, Fault::Answer("401 Who are you", challenge, ""));

        let known = Client::new(with_credentials(&file)).unwrap();
        let pulled = known.pull(&at(proxy.address, "tool:v1"), &bench.store(), &silent()).await;
        assert!(matches!(pulled, Err(OciError::Unauthorized { .. })), "{pulled:?}");
        let asked = stranger.asked("");
        assert!(!asked.is_empty(), "the redirect was followed");
        assert!(
            asked.iter().all(|asked| asked.authorization.is_none() && !asked.path.contains("token")),
            "{asked:?}"
        );
    });
}
