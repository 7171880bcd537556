//! The order of plugins: what the operator's configuration says, then what manifests say of each other, then by name. The same
//! set gives the same order, however it is found.

use std::collections::{BTreeMap, BTreeSet};

/// Plugins that cannot be brought into an order.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum OrderError {
    /// Each of these must come before the next, and the last before the first.
    #[error("no order is right for {}", .0.join(" before "))]
    Cycle(Vec<String>),
    /// Two of one name.
    #[error("two plugins are called {0}")]
    Twice(String),
}

impl OrderError {
    /// What to do about it.
    pub fn hint(&self) -> String {
        match self {
            Self::Cycle(names) => format!(
                "look at `plugins.order` in the configuration and at `before` and `after` in the manifests of {}, or disable one",
                names.iter().collect::<BTreeSet<_>>().into_iter().cloned().collect::<Vec<_>>().join(", ")
            ),
            Self::Twice(name) => format!("remove one: `vm plugin remove {name}`"),
        }
    }
}

/// What is known of one plugin.
#[derive(Debug, Clone, Copy)]
pub struct Wish<'a> {
    /// Its name.
    pub name: &'a str,
    /// Those that come after it.
    pub before: &'a [String],
    /// Those that come before it.
    pub after: &'a [String],
}

/// Their indices in order. Names of plugins that are not there are of no matter.
///
/// # Errors
/// A cycle, with its members.
pub fn order(wishes: &[Wish<'_>], explicit: &[String]) -> Result<Vec<usize>, OrderError> {
    let mut index = BTreeMap::new();
    for (number, wish) in wishes.iter().enumerate() {
        if index.insert(wish.name, number).is_some() {
            return Err(OrderError::Twice(wish.name.to_owned()));
        }
    }
    let mut firsts: Vec<BTreeSet<usize>> = vec![BTreeSet::new(); wishes.len()];
    let listed: Vec<usize> = explicit.iter().filter_map(|name| index.get(name.as_str()).copied()).collect();
    for pair in listed.windows(2) {
        firsts[pair[1]].insert(pair[0]);
    }
    for (number, wish) in wishes.iter().enumerate() {
        for other in wish.before.iter().filter_map(|name| index.get(name.as_str())) {
            firsts[*other].insert(number);
        }
        firsts[number].extend(wish.after.iter().filter_map(|name| index.get(name.as_str())));
    }
    let rank = |number: usize| {
        let place = listed.iter().position(|&other| other == number).unwrap_or(usize::MAX);
        (place, wishes[number].name)
    };
    let mut left: BTreeSet<_> = (0..wishes.len()).map(|number| (rank(number), number)).collect();
    let mut order = Vec::with_capacity(wishes.len());
    while !left.is_empty() {
        let free = left.iter().find(|(_, number)| firsts[*number].iter().all(|first| order.contains(first)));
        let Some(&free) = free else {
            return Err(cycle(&left.iter().map(|(_, n)| *n).collect(), &firsts, wishes));
        };
        left.remove(&free);
        order.push(free.1);
    }
    Ok(order)
}

/// Follows, from any that is left, what must come first until one is seen again.
fn cycle(left: &BTreeSet<usize>, firsts: &[BTreeSet<usize>], wishes: &[Wish<'_>]) -> OrderError {
    let mut path: Vec<usize> = Vec::new();
    let mut at = left.first().copied();
    while let Some(number) = at {
        if let Some(begin) = path.iter().position(|&seen| seen == number) {
            let mut names: Vec<_> = path[begin..].iter().rev().map(|&n| wishes[n].name.to_owned()).collect();
            names.push(names[0].clone());
            return OrderError::Cycle(names);
        }
        path.push(number);
        at = firsts[number].iter().find(|first| left.contains(first)).copied();
    }
    OrderError::Cycle(Vec::new())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sorted(plugins: &[(&str, &[&str], &[&str])], explicit: &[&str]) -> Result<Vec<String>, OrderError> {
        let own = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        let lists: Vec<_> =
            plugins.iter().map(|(name, before, after)| (*name, own(before), own(after))).collect();
        let wishes: Vec<_> = lists.iter().map(|(name, before, after)| Wish { name, before, after }).collect();
        Ok(order(&wishes, &own(explicit))?.into_iter().map(|n| wishes[n].name.to_owned()).collect())
    }

    #[test]
    fn the_order_does_not_depend_on_how_they_were_found() {
        let one = [("b", &[][..], &["c"][..]), ("c", &[], &[]), ("a", &[], &["gone"]), ("d", &["a"], &[])];
        let mut other = one;
        other.reverse();
        assert_eq!(sorted(&one, &[]).unwrap(), ["c", "b", "d", "a"]);
        assert_eq!(sorted(&one, &[]), sorted(&other, &[]));
        assert_eq!(sorted(&one, &["a", "gone", "c"]).unwrap(), ["d", "a", "c", "b"]);
    }

    #[test]
    fn a_cycle_is_named_and_nothing_else() {
        let plugins =
            [("a", &["b"][..], &[][..]), ("b", &["c"], &[]), ("c", &["a"], &[]), ("d", &[], &["a"])];
        let Err(OrderError::Cycle(names)) = sorted(&plugins, &[]) else { panic!("there is a cycle") };
        assert_eq!(names.len(), 4);
        assert!(names.first() == names.last() && !names.contains(&"d".to_owned()), "{names:?}");
        // The operator's list against a manifest is one too.
        let Err(OrderError::Cycle(names)) = sorted(&[("a", &["b"], &[]), ("b", &[], &[])], &["b", "a"])
        else {
            panic!("there is a cycle")
        };
        assert_eq!(names.len(), 3);
    }

    #[test]
    fn two_of_one_name_are_refused() {
        assert_eq!(sorted(&[("a", &[], &[]), ("a", &[], &[])], &[]), Err(OrderError::Twice("a".to_owned())));
    }
}
