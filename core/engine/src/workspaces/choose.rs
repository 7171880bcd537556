//! Which importer brings a workspace, and where to. Pure: what is asked for, what the workspace says of itself, what there is.

use vm_types::workspace::WorkspaceOffer;

use super::{WorkspacesError, settings::Settings};
use crate::ports::{ImportOffer, Probed};

/// Where workspaces are in a guest.
const BASE: &str = "/work";
/// The strategy that `--full` stands for.
const FULL: &str = "full";

/// What a person asks for.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Asked<'a> {
    /// `NAME` or `NAME/STRATEGY`.
    pub(super) importer: Option<&'a str>,
    /// All of the history.
    pub(super) full: bool,
}

/// An offer that was chosen, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Chosen {
    pub(super) offer: ImportOffer,
    pub(super) why: String,
}

/// Chooses among what importers offer.
///
/// # Errors
/// [`WorkspacesError::NoOffer`].
pub(super) fn choose(
    asked: Asked<'_>,
    settings: Option<&Settings>,
    probed: &Probed,
) -> Result<Chosen, WorkspacesError> {
    let own = settings.and_then(|settings| Some((settings, settings.importer.as_ref()?)));
    let (wanted, by) = match (asked.importer, own) {
        (Some(importer), _) => (Some(importer), "it was asked for"),
        (None, Some((_, said))) => (Some(said.value.as_str()), "the workspace's vm.toml says so"),
        (None, None) => (None, "it fits best"),
    };
    let (name, strategy) = match wanted.map(|wanted| wanted.split_once('/').ok_or(wanted)) {
        Some(Ok((name, strategy))) => (Some(name), Some(strategy)),
        Some(Err(name)) => (Some(name), None),
        None => (None, None),
    };
    let strategy = match strategy {
        // What a person says now counts more than what was written down.
        None | Some(_) if asked.full && asked.importer.is_none_or(|asked| !asked.contains('/')) => Some(FULL),
        Some(strategy) if asked.full && strategy != FULL => {
            return Err(WorkspacesError::NoOffer {
                message: format!("{strategy} is not all of the history"),
                hint: "leave out --full, or the strategy".into(),
            });
        }
        strategy => strategy,
    };
    let fits = |offer: &&ImportOffer| {
        name.is_none_or(|name| offer.plugin == name)
            && strategy.is_none_or(|strategy| offer.strategy == strategy)
    };
    match probed.offers.iter().find(fits) {
        Some(offer) if offer.score == 0 && wanted.is_none() && !asked.full => {
            Ok(Chosen { offer: offer.clone(), why: "nothing better is there".into() })
        }
        Some(offer) => {
            let why =
                if asked.full { format!("{by}, and all of the history was asked for") } else { by.into() };
            Ok(Chosen { offer: offer.clone(), why })
        }
        None => {
            let error = nothing(name, strategy, probed);
            // Whoever wrote it is to find the place.
            Err(match (asked.importer, own, error) {
                (None, Some((settings, said)), WorkspacesError::NoOffer { message, hint }) => {
                    let place = settings.refused("importer", said, &message);
                    WorkspacesError::NoOffer { message: place.to_string(), hint }
                }
                (_, _, error) => error,
            })
        }
    }
}

fn nothing(name: Option<&str>, strategy: Option<&str>, probed: &Probed) -> WorkspacesError {
    let wanted = match (name, strategy) {
        (Some(name), Some(strategy)) => format!("{name}/{strategy}"),
        (Some(name), None) => name.to_owned(),
        (None, Some(strategy)) => format!("any importer's {strategy}"),
        (None, None) => "any importer".to_owned(),
    };
    let ways: Vec<String> =
        probed.offers.iter().map(|offer| format!("{}/{}", offer.plugin, offer.strategy)).collect();
    let failed = probed.failures.iter().find(|failure| name.is_none_or(|name| failure.plugin == name));
    WorkspacesError::NoOffer {
        message: match failed {
            Some(failure) => format!("{wanted} does not offer to bring this workspace: {failure}"),
            None => format!("{wanted} does not offer to bring this workspace"),
        },
        hint: if ways.is_empty() {
            "`vm plugin ls` lists the plugins; importers come with vmd and can be enabled again".into()
        } else {
            format!("what there is for it: {}", ways.join(", "))
        },
    }
}

/// As people are shown it.
pub(super) fn shown(offer: &ImportOffer) -> WorkspaceOffer {
    WorkspaceOffer {
        importer: offer.plugin.clone(),
        strategy: offer.strategy.clone(),
        score: offer.score,
        description: offer.description.clone(),
        warnings: offer.warnings.clone(),
    }
}

/// The directory in the guest: what was asked for, what the workspace says, or one named after it.
///
/// # Errors
/// [`WorkspacesError::Destination`], [`WorkspacesError::Settings`].
pub(super) fn destination(
    asked: Option<&str>,
    settings: Option<&Settings>,
    name: &str,
) -> Result<String, WorkspacesError> {
    let own = settings.and_then(|settings| Some((settings, settings.to.as_ref()?)));
    match (asked, own) {
        (Some(path), _) => {
            checked(path).map_err(|reason| WorkspacesError::Destination { path: path.to_owned(), reason })
        }
        (None, Some((settings, said))) => {
            checked(&said.value).map_err(|reason| settings.refused("to", said, reason))
        }
        (None, None) => Ok(format!("{BASE}/{}", tame(name))),
    }
}

/// An absolute path without detours, as it is recorded; or why it is none.
fn checked(path: &str) -> Result<String, &'static str> {
    if !path.starts_with('/') {
        return Err("it is not absolute");
    }
    if path.chars().any(char::is_control) {
        return Err("it has control characters");
    }
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    if parts.contains(&"..") {
        return Err("it has .. in it");
    }
    if parts.is_empty() {
        return Err("it is the guest's root");
    }
    Ok(format!("/{}", parts.join("/")))
}

/// A directory's name as a name that needs no quoting anywhere.
fn tame(name: &str) -> String {
    let tame: String = name
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '-' })
        .take(100)
        .collect();
    let tame = tame.trim_start_matches('-');
    if tame.trim_matches('.').is_empty() { "workspace".to_owned() } else { tame.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::{super::settings::tests::said, *};
    use crate::ports::ImportFailure;

    fn probed(offers: &[(&str, &str, u32)]) -> Probed {
        let offer = |(plugin, strategy, score): &(&str, &str, u32)| ImportOffer {
            plugin: (*plugin).into(),
            strategy: (*strategy).into(),
            score: *score,
            description: String::new(),
            warnings: Vec::new(),
        };
        Probed { offers: offers.iter().map(offer).collect(), failures: Vec::new() }
    }

    fn chosen(asked: Asked<'_>, settings: Option<&str>, probed: &Probed) -> Result<String, String> {
        let settings = settings.map(|importer| said(&format!("[workspace]\nimporter = {importer:?}")));
        choose(asked, settings.as_ref(), probed)
            .map(|chosen| format!("{}/{}", chosen.offer.plugin, chosen.offer.strategy))
            .map_err(|error| format!("{error}; {}", error.hint().unwrap_or_default()))
    }

    #[test]
    fn the_best_offer_wins_unless_one_is_asked_for() {
        let there = probed(&[("git", "shallow", 80), ("git", "full", 60), ("copy", "files", 10)]);
        let asked = |importer| Asked { importer: Some(importer), full: false };
        let full = |importer| Asked { importer, full: true };
        assert_eq!(chosen(Asked::default(), None, &there).unwrap(), "git/shallow");
        assert_eq!(chosen(Asked::default(), Some("copy"), &there).unwrap(), "copy/files");
        assert_eq!(chosen(asked("git/full"), Some("copy"), &there).unwrap(), "git/full");
        assert_eq!(chosen(asked("git"), Some("copy"), &there).unwrap(), "git/shallow");
        assert_eq!(chosen(full(None), None, &there).unwrap(), "git/full");
        assert_eq!(chosen(full(None), Some("git/shallow"), &there).unwrap(), "git/full");
        assert_eq!(chosen(full(Some("git/full")), None, &there).unwrap(), "git/full");
        assert!(chosen(full(Some("git/shallow")), None, &there).unwrap_err().contains("--full"));
        assert!(
            chosen(full(Some("copy")), None, &there).unwrap_err().starts_with("copy/full does not offer")
        );
        let none = chosen(asked("rsync"), None, &there).unwrap_err();
        assert!(none.contains("rsync") && none.contains("git/shallow, git/full, copy/files"), "{none}");
        let none = chosen(Asked::default(), Some("rsync"), &there).unwrap_err();
        let place = "/src/vm.toml, line 2: `importer` is \"rsync\": rsync does not offer";
        assert!(none.starts_with(place) && none.contains("git/shallow"), "{none}");
    }

    #[test]
    fn an_importer_that_failed_is_named_where_it_is_wanted() {
        let mut there = probed(&[("copy", "files", 10)]);
        there.failures.push(ImportFailure {
            plugin: "mine".into(),
            code: "x".into(),
            message: "mine has trapped".into(),
            hint: None,
        });
        let asked = Asked { importer: Some("mine"), full: false };
        assert!(chosen(asked, None, &there).unwrap_err().contains("mine has trapped"));
        assert_eq!(chosen(Asked::default(), None, &there).unwrap(), "copy/files");
        assert!(chosen(Asked::default(), None, &probed(&[])).unwrap_err().contains("vm plugin ls"));
    }

    #[test]
    fn destinations_are_named_after_the_workspace_and_never_lead_astray() {
        let own = |name| destination(None, None, name).unwrap();
        assert_eq!(own("project"), "/work/project");
        assert_eq!(own("my project\n*"), "/work/my-project--");
        assert_eq!(own("-rf"), "/work/rf");
        assert_eq!(own(".dotfiles"), "/work/.dotfiles");
        for name in ["", ".", "..", "---", "\u{fffd}\u{fffd}"] {
            assert_eq!(own(name), "/work/workspace", "{name:?}");
        }
        let to = |path| destination(Some(path), None, "x").map_err(|error| error.to_string());
        assert_eq!(to("//srv/./a b/").unwrap(), "/srv/a b");
        for wrong in ["srv", "", "/", "/.", "/a/../b", "/a\nb"] {
            assert!(to(wrong).is_err(), "{wrong:?}");
        }
        let settings = said("[workspace]\nto = \"/srv/x\"");
        assert_eq!(destination(None, Some(&settings), "x").unwrap(), "/srv/x");
        assert_eq!(destination(Some("/y"), Some(&settings), "x").unwrap(), "/y");
        let wrong = destination(None, Some(&said("[workspace]\nto = \"x/y\"")), "x").unwrap_err();
        assert!(wrong.to_string().starts_with("/src/vm.toml, line 2: `to`"), "{wrong}");
    }
}
