//! Each bundled component in the real host code: built as a user builds it, and as it was when the interface was new.

#![expect(clippy::unwrap_used, reason = "what helps tests may fail like one")]

mod checks;
mod copies;
mod corpus;
mod host;
mod importers;
mod interface;
mod languages;
mod sdk;

/// The same tests for each source of components.
macro_rules! for_each_source {
    ($($name:ident),+ $(,)?) => {
        for_each_source!(fresh Fresh $($name)+);
        for_each_source!(kept Corpus $($name)+);
    };
    ($module:ident $source:ident $($name:ident)+) => {
        mod $module {
            $(
                #[tokio::test]
                async fn $name() {
                    crate::checks::$name(crate::host::Source::$source).await;
                }
            )+
        }
    };
}

for_each_source! {
    components_are_small_and_answer_the_same_when_asked_again,
    nat_lets_one_address_out_and_only_answers_in,
    nat_leaves_other_networks_alone_and_needs_its_grants,
    nat_refuses_a_configuration_that_no_rule_could_have,
    the_work_disk_is_one_disk_in_host_machine_and_guest,
    a_work_disk_does_not_shrink,
    limits_refuse_with_a_hint,
    provision_plans_files_and_environment,
    first_commands_run_once_and_again_where_one_failed,
    the_zone_has_names_and_the_way_back,
}
