package command

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/memlinux/memlinux/cli/client"
	"github.com/memlinux/memlinux/daemon/api"
	"github.com/memlinux/memlinux/daemon/api/recipe"
)

func newRecipe(g *global) *cobra.Command {
	c := &cobra.Command{
		Use:   "recipe",
		Short: "Begin or check a recipe file, " + recipe.FileName,
		Long: `A recipe file says what goes into the system: kernel, modules, programs, files,
settings and services. Everything in it is optional.`,
		Example: `  memlinux recipe init
  memlinux recipe check`,
		Args: args(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(&cobra.Command{
		Use:   "init [FILE]",
		Short: "Write a recipe in which every key is a comment, with its standard value and an example",
		Long: `Writes a recipe file (` + recipe.FileName + `) that says nothing yet: every key is a
comment, with its standard value and an example. A file that exists is not
overwritten.`,
		Example: `  memlinux recipe init
  memlinux recipe init kiosk/memlinux.toml`,
		Args: atMostOne("FILE"),
		RunE: func(_ *cobra.Command, a []string) error { return g.initRecipe(os.Stdout, recipePath(a)) },
	}, &cobra.Command{
		Use:   "check [FILE]",
		Short: "Name all that is wrong with a recipe, each with its line",
		Long: `Checks a recipe file (` + recipe.FileName + `) and whether the files are there that it
names. Each problem is a line FILE:LINE: KEY: REASON; the exit code is then 2.`,
		Example: `  memlinux recipe check
  memlinux recipe check --json | jq -r 'select(.event == "problem").text'`,
		Args: atMostOne("FILE"),
		RunE: func(_ *cobra.Command, a []string) error { return g.checkRecipe(os.Stdout, recipePath(a)) },
	})
	return c
}

func recipePath(a []string) string {
	if len(a) > 0 {
		return a[0]
	}
	return recipe.FileName
}

func (g *global) initRecipe(out io.Writer, path string) error {
	err := writeSample(path)
	if g.json {
		return errors.Join(err, printJSONReport(out, api.Job{State: api.StateSucceeded}, path, err))
	}
	if err == nil {
		fmt.Fprintf(out, "%s is written; all in it is a comment until you take the # away\n", path)
	}
	return err
}

func writeSample(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666) //nolint:gosec // the umask decides
	if errors.Is(err, fs.ErrExist) {
		return refusal("%s exists and is not overwritten; give another name", path)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return noFolder(path)
	}
	if err != nil {
		return err
	}
	_, err = f.WriteString(recipe.Sample)
	if err = errors.Join(err, f.Close()); err != nil {
		_ = os.Remove(path) // half a recipe would be in the way of the next try
	}
	return err
}

// problemEvent is one problem of --json.
type problemEvent struct {
	Event string `json:"event"`
	recipe.Problem
}

func (g *global) checkRecipe(out io.Writer, path string) error {
	text, err := readRecipe(path)
	if err == nil {
		r, problems := recipe.Parse(text, path)
		r.Rebase(filepath.Dir(path))
		err = problemsError(addMissing(&r, problems))
	}
	if g.json {
		var invalid *invalidRecipe
		if errors.As(err, &invalid) {
			for _, p := range invalid.problems {
				if err := json.NewEncoder(out).Encode(problemEvent{"problem", p}); err != nil {
					return err
				}
			}
		}
		return errors.Join(err, printJSONReport(out, api.Job{State: api.StateSucceeded}, "", err))
	}
	if err == nil {
		fmt.Fprintf(out, "%s is right\n", path)
	}
	return err
}

// invalidRecipe is a recipe that has problems, or that can't be read.
type invalidRecipe struct {
	message  string
	problems []recipe.Problem
}

// problemsError is nil where there are none.
func problemsError(problems []recipe.Problem) error {
	if len(problems) == 0 {
		return nil
	}
	if len(problems) == 1 {
		return &invalidRecipe{problems[0].String(), problems}
	}
	lines := []string{fmt.Sprintf("%s has %d problems:", problems[0].File, len(problems))}
	for _, p := range problems {
		lines = append(lines, p.String())
	}
	return &invalidRecipe{strings.Join(lines, "\n"), problems}
}

func (e *invalidRecipe) Error() string { return e.message }

// Unwrap gives the exit code of a configuration that can't be understood, and
// the contract's name.
func (e *invalidRecipe) Unwrap() []error {
	return []error{&client.ConfigError{Message: e.message}, &api.Error{Name: api.ErrInvalidRecipe, Message: e.message}}
}

// readRecipe reads the text of a recipe.
func readRecipe(path string) ([]byte, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, &invalidRecipe{message: path + " does not exist; begin one with: memlinux recipe init " + path}
	}
	if err != nil {
		return nil, &invalidRecipe{message: err.Error()}
	}
	defer f.Close()
	// A byte more than Parse takes: it then says that it is too much.
	text, err := io.ReadAll(io.LimitReader(f, recipe.MaxSize+1))
	if err != nil {
		return nil, &invalidRecipe{message: err.Error()}
	}
	return text, nil
}

// addMissing adds to the problems of r, sorted by line, the files and folders
// that it names and that can't be had.
func addMissing(r *recipe.Recipe, problems []recipe.Problem) []recipe.Problem {
	told := map[recipe.Problem]bool{}
	place := func(p recipe.Problem) recipe.Problem { return recipe.Problem{Line: p.Line, Key: p.Key} }
	for _, p := range problems {
		told[place(p)] = true
	}
	for _, p := range r.Paths() {
		if text := lookAt(p); text != "" {
			if b := r.Blame(p.Key, text); !told[place(b)] {
				problems = append(problems, b)
			}
		}
	}
	slices.SortStableFunc(problems, func(a, b recipe.Problem) int { return cmp.Compare(a.Line, b.Line) })
	return problems
}

// lookAt says what is wrong with what is at a path of the recipe, or "".
func lookAt(p recipe.Path) string {
	info, err := os.Stat(p.Path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return p.Path + " does not exist"
	case err != nil:
		return err.Error()
	case p.Want == recipe.WantFolder && !info.IsDir():
		return p.Path + " is no folder"
	case p.Want == recipe.WantFile && info.IsDir():
		return p.Path + " is a folder; [[overlay]] takes those"
	case !info.IsDir() && !info.Mode().IsRegular():
		return p.Path + " is no regular file"
	}
	return ""
}
