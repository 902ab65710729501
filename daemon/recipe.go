package daemon

import (
	"bytes"
	"io"
	"math"
	"os"
	"slices"
	"strings"

	"github.com/memlinux/memlinux/bootloader/menulst"
	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/daemon/api/recipe"
	"github.com/memlinux/memlinux/imagegen"
	"github.com/memlinux/memlinux/imagegen/initramfs"
	"github.com/memlinux/memlinux/imagegen/kbuild"
	"github.com/memlinux/memlinux/imagegen/settings"
)

// maxFragment bounds a kernel's or busybox's configuration that a client sends,
// in bytes: the largest have a third of a MiB.
const maxFragment = 1 << 20

// recipeOf reads the options that say what system to make: a recipe, and what is
// to be other than in it. Files that the recipe names come as descriptors.
func (s *Server) recipeOf(o *options) imagegen.Recipe {
	r, problems := recipe.Parse([]byte(get[string](o, api.OptRecipe)), recipe.FileName)
	if len(problems) > 0 {
		lines := make([]string, len(problems))
		for i, p := range problems {
			lines[i] = p.String()
		}
		o.fail("%s", strings.Join(lines, "\n"))
	}
	out := imagegen.Recipe{
		Kernel:    s.kernelOf(o, &r),
		Busybox:   busyboxOf(o, &r),
		Modules:   get[[]string](o, api.OptModules),
		Microcode: stringOr(o, api.OptMicrocode, r.Microcode),
		Payload:   o.file(api.OptPayload),
		Rootfs:    o.file(api.OptRootfs),
		Append:    stringOr(o, api.OptAppend, r.Append),
		Boot:      r.Boot,
		Epoch:     o.epoch(),
		Settings:  settingsOf(o, &r),
		Compression: initramfs.Compression{
			Name:  stringOr(o, api.OptCompression, r.Compression),
			Level: r.CompressionLevel,
		},
	}
	if len(out.Modules) == 0 {
		out.Modules = r.Modules
	}
	if out.Rootfs == nil {
		out.Settings.Guest = nil
	}
	ram := get[uint64](o, api.OptRAM)
	if ram > math.MaxInt64 {
		o.fail("option %q is %d bytes, which no machine has", api.OptRAM, ram)
	}
	if out.RAM = int64(ram); ram == 0 {
		out.RAM = int64(r.RAM)
	}
	if out.Compression.Name != r.Compression {
		out.Compression.Level = 0 // it was another's
	}
	if r.Rootfs != "" && out.Rootfs == nil {
		o.needs("rootfs", api.OptRootfs)
	}
	if len(r.Programs)+len(r.Files)+len(r.Overlays) > 0 && out.Payload == nil {
		o.needs("program", api.OptPayload)
	}
	if err := menulst.CheckCommandLine(out.Append); err != nil {
		o.fail("option %q: %v", api.OptAppend, err)
	}
	if err := out.Validate(); err != nil {
		o.fail("%v", err)
	}
	return out
}

// needs says that the files that a recipe's key, or the option of its name,
// names can only be had as descriptors.
func (o *options) needs(key, option string) {
	o.fail("%s names a file, and the daemon opens none that a client names: send it open, as the option %q", key, option)
}

// stringOr is the string option, or what the recipe has.
func stringOr(o *options, key, otherwise string) string {
	if _, ok := o.left[key]; !ok {
		o.known = append(o.known, key)
		return otherwise
	}
	return get[string](o, key)
}

// text is the option as text, whether it comes as a string or as a file; isFile
// says that it came as a file.
func (o *options) text(key string) (text []byte, isFile bool) {
	v, ok := o.left[key]
	if !ok {
		o.known = append(o.known, key)
		return nil, false
	}
	if _, is := v.Value().(string); is {
		return []byte(get[string](o, key)), false
	}
	return o.read(key, o.file(key)), true
}

func (o *options) read(key string, f *os.File) []byte {
	if f == nil {
		return nil
	}
	text, err := io.ReadAll(io.NewSectionReader(f, 0, maxFragment+1))
	switch {
	case err != nil:
		o.fail("option %q: %v", key, err)
	case len(text) > maxFragment:
		o.fail("option %q: the file has more than %d MiB", key, maxFragment>>20)
	}
	return text
}

// texts are files by name.
func (o *options) texts(key string) map[string][]byte {
	all := map[string][]byte{}
	for name, f := range o.fileMap(key, toBeRead) {
		all[name] = o.read(key, f)
	}
	return all
}

func (s *Server) kernelOf(o *options, r *recipe.Recipe) imagegen.KernelSource {
	var k imagegen.KernelSource
	for name, text := range o.texts(api.OptKernelConfigs) {
		if k.Configs == nil {
			k.Configs = map[string]io.ReaderAt{}
		}
		k.Configs[name] = bytes.NewReader(text)
	}
	config, isFile := o.text(api.OptKernelConfig)
	fragments := o.texts(api.OptKernelFragments)
	k.Source = imagegen.SourceCode{
		File:      o.file(api.OptKernelSource),
		SHA256:    stringOr(o, api.OptKernelSHA256, r.KernelBuild.SHA256),
		Keyring:   o.file(api.OptKernelKeyring),
		Signature: o.file(api.OptKernelSignature),
	}
	source := r.Kernel
	switch v, given := o.left[api.OptKernel]; {
	case !given:
		o.known = append(o.known, api.OptKernel)
		if r.Line("kernel") == 0 {
			if err := source.UnmarshalText([]byte(s.config().Kernel)); err != nil {
				o.fail("the configuration's kernel: %v", err)
			}
		}
	case k.Source.File != nil:
		o.fail("options %q and %q exclude each other", api.OptKernel, api.OptKernelSource)
		o.take(api.OptKernel)
	default:
		if _, isString := v.Value().(string); !isString {
			k.File, k.Source = o.file(api.OptKernel), imagegen.SourceCode{}
			return k
		}
		if err := source.UnmarshalText([]byte(get[string](o, api.OptKernel))); err != nil {
			o.fail("option %q: %v", api.OptKernel, err)
		}
	}
	if k.Source.File == nil {
		switch source.Kind {
		case recipe.KindHost:
			k.Host = true
		case recipe.KindDebian:
			k.Debian = source.Value
		case recipe.KindDebianSource:
			k.Source.Debian = "linux-source-" + source.Value
		case recipe.KindSourceURL:
			k.Source.URL = source.Value
		case recipe.KindFile:
			o.needs("kernel", api.OptKernel)
		case recipe.KindSourcePath:
			o.needs("kernel", api.OptKernelSource)
		}
	}
	if k.Source.File == nil && k.Source.URL == "" && k.Source.Debian == "" {
		k.Source = imagegen.SourceCode{} // a digest of the recipe's that is for another kernel
		return k
	}
	switch text := string(config); {
	case isFile:
		k.Config = config
	case text != "":
		k.Base = text
	default:
		if k.Base = r.KernelBuild.Config; k.Base != "minimal" && k.Base != "defconfig" {
			o.needs("kernel-build.config", api.OptKernelConfig)
		}
	}
	if len(r.KernelBuild.Fragments) > 0 && len(fragments) == 0 {
		o.needs("kernel-build.fragments", api.OptKernelFragments)
	}
	if r.KernelBuild.Keyring != "" && k.Source.Keyring == nil {
		o.needs("kernel-build.keyring", api.OptKernelKeyring)
	}
	names := make([]string, 0, len(fragments))
	for name := range fragments {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		k.Fragments = append(k.Fragments, kbuild.Fragment{Name: name, Text: fragments[name]})
	}
	return k
}

func busyboxOf(o *options, r *recipe.Recipe) imagegen.BusyboxSource {
	var b imagegen.BusyboxSource
	fragments := o.texts(api.OptBusyboxFragments)
	b.Source = imagegen.SourceCode{File: o.file(api.OptBusyboxSource), SHA256: stringOr(o, api.OptBusyboxSHA256, r.BusyboxBuild.SHA256)}
	source := r.Busybox
	switch v, given := o.left[api.OptBusybox]; {
	case !given:
		o.known = append(o.known, api.OptBusybox)
	case b.Source.File != nil:
		o.fail("options %q and %q exclude each other", api.OptBusybox, api.OptBusyboxSource)
		o.take(api.OptBusybox)
	default:
		if _, isString := v.Value().(string); !isString {
			b.File, b.Source = o.file(api.OptBusybox), imagegen.SourceCode{}
			return b
		}
		if err := source.UnmarshalText([]byte(get[string](o, api.OptBusybox))); err != nil {
			o.fail("option %q: %v", api.OptBusybox, err)
		}
	}
	if b.Source.File == nil {
		switch source.Kind {
		case recipe.KindHost:
			b.Host = true
		case recipe.KindDebian:
			b.Debian = true
		case recipe.KindDebianSource:
			b.DebianSource = true
		case recipe.KindSourceURL:
			b.Source.URL = source.Value
		case recipe.KindFile:
			o.needs("busybox", api.OptBusybox)
		case recipe.KindSourcePath:
			o.needs("busybox", api.OptBusyboxSource)
		}
	}
	if b.Source.File == nil && b.Source.URL == "" {
		b.Source = imagegen.SourceCode{}
	}
	if b.DebianSource || b.Source != (imagegen.SourceCode{}) {
		if b.Fragments = fragments; len(r.BusyboxBuild.Fragments) > 0 && len(fragments) == 0 {
			o.needs("busybox-build.fragments", api.OptBusyboxFragments)
		}
	}
	return b
}

// settingsOf leaves out what the recipe does not say, which is then as the
// system has it anyway: a root tree keeps its own name.
func settingsOf(o *options, r *recipe.Recipe) settings.Settings {
	set := settings.Settings{Keymap: r.Keymap, RootPassword: r.RootPassword, Guest: &settings.Guest{Command: settings.Command{
		Argv: get[[]string](o, api.OptRootfsCommand),
		Env:  get[[]string](o, api.OptRootfsEnv),
		Dir:  get[string](o, api.OptRootfsDir),
		User: get[string](o, api.OptRootfsUser),
	}}}
	if r.Line("hostname") > 0 {
		set.Hostname = r.Hostname
	}
	if r.Line("timezone") > 0 {
		set.Timezone = r.Timezone
	}
	if r.Line("consoles") > 0 {
		set.Consoles = r.Consoles
	}
	if r.DHCP {
		set.DHCP = []string{settings.AllLinks}
	}
	for _, v := range r.Services {
		set.Services = append(set.Services, settings.Service{Command: v.Command, Action: v.Action, Console: v.Console})
	}
	return set
}
