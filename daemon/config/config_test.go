package config

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

func write(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "memlinux.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestFileThenEnvironment(t *testing.T) {
	t.Setenv("MEMLINUX_STATE_DIR", "/srv/state")
	t.Setenv("MEMLINUX_MEMORY", "1024")
	c, err := Load(write(t, "cache-dir = \"/srv/cache\"\nstate-dir = \"/loses\"\njob-retention = \"2m\"\n"))
	if err != nil {
		t.Fatal(err)
	}
	want := Config{CacheDir: "/srv/cache", CacheLimit: 20 << 10, StateDir: "/srv/state", Kernel: "auto", Memory: 1024, JobRetention: 2 * time.Minute, IdleExit: time.Minute}
	if c != want {
		t.Errorf("got %+v, want %+v", c, want)
	}
}

func TestEveryFieldHasADefault(t *testing.T) {
	if len(Keys()) != len(defaults) {
		t.Errorf("keys %v, defaults %v", Keys(), defaults)
	}
	c, err := Load(write(t, ""))
	if err != nil || c.CacheDir != "/var/cache/memlinux" {
		t.Errorf("an empty file gave %+v, %v", c, err)
	}
}

func TestBadConfigurationNamesFileAndKey(t *testing.T) {
	for name, c := range map[string]struct{ text, want string }{
		"unknown key":                   {"cashe-dir = \"/x\"\n", "cashe-dir"},
		"unknown table":                 {"[vm]\nmemory = 1\n", "vm.memory"},
		"wrong type":                    {"memory = \"much\"\n", `memory is "much"; it must be a whole number`},
		"relative folder":               {"cache-dir = \"x\"\n", "cache-dir"},
		"kernel by path":                {"kernel = \"/boot/vmlinuz\"\n", "kernel"},
		"a package's name that is none": {"kernel = \"debian:Foo Bar\"\n", "kernel must be auto or debian:PACKAGE"},
		"no package":                    {"kernel = \"debian:\"\n", "kernel must be"},
		"another source":                {"kernel = \"debian-source:6.1\"\n", "kernel must be"},
		"this machine's":                {"kernel = \"host\"\n", "kernel must be"},
		"negative limit":                {"cache-limit = -1\n", "cache-limit"},
		"too little memory":             {"memory = 1\n", "memory"},
		"no period":                     {"idle-exit = \"soon\"\n", `idle-exit is "soon"; it must be a time`},
		"negative period":               {"idle-exit = \"-1s\"\n", "idle-exit"},
		"not TOML":                      {"= =\n", "toml"},
	} {
		path := write(t, c.text)
		_, err := Load(path)
		if err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Load(filepath.Join(t.TempDir(), "none.toml")); err == nil {
		t.Error("a named file that is missing was taken")
	}
}

// No file is blamed for what the environment says.
func TestBadEnvironmentIsNamed(t *testing.T) {
	for _, c := range []struct{ name, variable, value, want string }{
		{"wrong type", "MEMLINUX_MEMORY", "x", `MEMLINUX_MEMORY in the environment is "x"; it must be a whole number`},
		{"out of range", "MEMLINUX_MEMORY", "3", "MEMLINUX_MEMORY in the environment must be 64 to 1048576"},
		{"a package's name that is none", "MEMLINUX_KERNEL", "debian:Foo Bar", "MEMLINUX_KERNEL in the environment must be"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Setenv(c.variable, c.value)
			path := write(t, "memory = 1024\n")
			if _, err := Load(path); err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), path) {
				t.Errorf("%v", err)
			}
		})
	}
}

func FuzzLoad(f *testing.F) {
	f.Add("cache-dir = \"/x\"\n[a.b]\nc = [1, {d = 2}]\n")
	f.Fuzz(func(t *testing.T, text string) {
		path := filepath.Join(t.TempDir(), "f.toml")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, _ = Load(path)
	})
}

// What users read has every key, and the standard value that holds.
func TestDocumentation(t *testing.T) {
	page, err := os.ReadFile("../../docs/config.md")
	if err != nil {
		t.Fatal(err)
	}
	example, err := os.ReadFile("../../docs/memlinux.toml")
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range Keys() {
		if !strings.Contains(string(page), "| `"+key+"` |") {
			t.Errorf("docs/config.md has no row for %s", key)
		}
		if !strings.Contains(string(example), "\n#"+key+" = ") {
			t.Errorf("docs/memlinux.toml has no %s", key)
		}
	}
	text := regexp.MustCompile(`(?m)^#([a-z-]+ = )`).ReplaceAllString(string(example), "$1")
	shown, err := Load(write(t, text))
	if err != nil {
		t.Fatal(err)
	}
	if standard, err := Load(write(t, "")); err != nil || shown != standard {
		t.Errorf("docs/memlinux.toml says %+v, standard is %+v (%v)", shown, standard, err)
	}
}
