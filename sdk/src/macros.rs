//! The macros that export an author's type.

/// Exports hooks of a type that implements their traits: `capability!(Limits: Preflight, Doctor);`. Once in a crate.
///
/// The host asks only for the hooks named here; all others cost nothing.
#[macro_export]
macro_rules! capability {
    ($plugin:ty: $($hook:ident),+ $(,)?) => { $( $crate::__hook!($hook, $plugin); )+ };
}

/// Exports a type that implements [`Resolver`](crate::Resolver): `dns!(Zone);`. Once in a crate.
#[macro_export]
macro_rules! dns {
    ($plugin:ty) => {
        $crate::__export!(dns, Resolver, $plugin);
    };
}

/// Exports a type that implements [`Importer`](crate::Importer): `importer!(Copy);`. Once in a crate.
#[macro_export]
macro_rules! importer {
    ($plugin:ty) => {
        $crate::__export!(importer, Importer, $plugin);
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __hook {
    (Preflight, $plugin:ty) => {
        $crate::__export!(preflight, Preflight, $plugin);
    };
    (ContributeGuest, $plugin:ty) => {
        $crate::__export!(contribute_guest, ContributeGuest, $plugin);
    };
    (ContributeMachine, $plugin:ty) => {
        $crate::__export!(contribute_machine, ContributeMachine, $plugin);
    };
    (PrepareHost, $plugin:ty) => {
        $crate::__export!(prepare_host, PrepareHost, $plugin);
    };
    (PostStart, $plugin:ty) => {
        $crate::__export!(post_start, PostStart, $plugin);
    };
    (ConfigChange, $plugin:ty) => {
        $crate::__export!(config_change, ConfigChange, $plugin);
    };
    (Cleanup, $plugin:ty) => {
        $crate::__export!(cleanup, Cleanup, $plugin);
    };
    (Doctor, $plugin:ty) => {
        $crate::__export!(doctor, Doctor, $plugin);
    };
    ($other:ident, $plugin:ty) => {
        ::core::compile_error!(::core::concat!(
            ::core::stringify!($other),
            " is no hook; there is: Preflight, ContributeGuest, ContributeMachine, PrepareHost, PostStart, ",
            "ConfigChange, Cleanup, Doctor",
        ));
    };
}

// Exports have names that only a WASM linker takes; natively the trait is checked, so that a test build says the same.
#[doc(hidden)]
#[macro_export]
macro_rules! __export {
    ($module:ident, $trait:ident, $plugin:ty) => {
        const _: () = {
            const fn implements<T: $crate::$trait>() {}
            implements::<$plugin>();
            #[cfg(target_arch = "wasm32")]
            type Exported = $crate::Adapter<$plugin>;
            #[cfg(target_arch = "wasm32")]
    $crate::bindings::$module::export!(Exported with_types_in $crate::bindings::$module);
        };
    };
}
